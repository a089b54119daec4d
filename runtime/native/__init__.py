"""Simulation in C++ of the usual run: the same ends and figures as the loop in Python, sooner.

Each file in C++ says which file in Python it follows. What they do not follow raises NotCovered,
at the start or in the midst of the run, and is to be simulated in Python from the beginning.
"""

from sagec.runtime.native.library import CoreError, NotCovered, is_built, load, recipe
from sagec.runtime.native.serving import Served, serve

__all__ = ["CoreError", "NotCovered", "Served", "is_built", "load", "recipe", "serve"]
