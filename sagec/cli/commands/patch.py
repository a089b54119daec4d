"""patch TurboMind in memory: build, check, or run a program with it"""

from __future__ import annotations

import argparse

EPILOG = """actions:
  status    which lmdeploy is here, whether it is known and the patches are built
  build     build the patches into the cache
  verify    the library's checksum, its seams and the self-test; nothing is patched
  selftest  the self-test alone
  apply     patch this process and put it back: a proof that it works here;
            with a program behind --, run that with TurboMind patched

examples:
  sagec patch status
  sagec patch verify --json
  sagec patch apply -- lmdeploy serve api_server MODEL
"""

ACTIONS = ("status", "build", "verify", "selftest", "apply")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, how to print, and perhaps a program."""
    parser.add_argument("action", metavar="ACTION", choices=ACTIONS, help=", ".join(ACTIONS))
    parser.add_argument(
        "program",
        metavar="PROGRAM",
        nargs="*",
        default=[],  # without one argparse would call it required
        help="apply: a console script, -m MODULE or a file of Python, with its arguments",
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Do it; a refusal says why, and TurboMind is stock."""
    from sagec.cli import patches, writing
    from sagec.cli.failure import UsageError

    if args.program and args.action != "apply":
        raise UsageError(f"{args.program[0]!r} is one argument too many for {args.action}")
    if args.program:
        if args.json:
            raise UsageError("--json is for what sagec prints, and a program prints for itself")
        return patches.run_patched(args.program)
    with writing.working(f"{args.action}: TurboMind"):
        told = patches.ACTIONS[args.action]()
    if args.json:
        writing.print_json(told)
        return 0
    patches.show(told)
    return 0
