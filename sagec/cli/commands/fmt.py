"""print .sage files canonically, in place"""

from __future__ import annotations

import argparse

EPILOG = """examples:
  sagec fmt examples/chat.sage
  sagec fmt --check examples/*.sage
  sagec fmt --stdout draft.sage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILES, and whether to write them."""
    parser.add_argument("files", metavar="FILE", nargs="+", help=".sage; -: stdin to stdout")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="write nothing; 1 if a file would change")
    how.add_argument("--stdout", action="store_true", help="write to stdout instead of the file")


def run(args: argparse.Namespace) -> int:
    """Format each file; with --check, 1 where one is not canonical."""
    import sys

    from sagec import language
    from sagec.cli import reading, writing

    changed = 0
    for path in args.files:
        text = reading.decoded(reading.read_bytes(path), reading.shown(path))
        canonical = language.format(text, reading.shown(path))
        if args.check:
            if canonical != text:
                print(f"{reading.shown(path)}: not as `sagec fmt` prints it", file=sys.stderr)
                changed += 1
        elif args.stdout or path == "-":
            sys.stdout.write(canonical)
        elif canonical != text:
            writing.write_text(path, canonical)
            print(f"{path}: formatted", file=sys.stderr)
    return 1 if changed else 0
