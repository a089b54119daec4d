"""`python -m sagec.cli`, where the script `sagec` is not on the path."""

import sys

from sagec.cli import main

sys.exit(main())
