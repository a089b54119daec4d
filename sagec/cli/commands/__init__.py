"""The commands of sagec, a file each.

A command's file has a docstring whose first line is its help, an EPILOG with examples,
`add_arguments(parser)`, and `run(args)`, which gives the exit code. At its top it imports nothing
heavy, because `sagec --help` imports them all.
"""

ORDER = (
    "run",
    "top",
    "replay",
    "explain",
    "compile",
    "opt",
    "fmt",
    "passes",
    "strategies",
    "profile",
    "doctor",
    "patch",
    "completion",
)
"""How the help lists them; one that is not here comes last."""

PROGRAM_BEHIND = ("patch",)
"""Commands that run the program whose command line stands behind `--`; it is added to `program`."""
