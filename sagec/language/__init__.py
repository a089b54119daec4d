"""The .sage language: models, clusters and requests as people write them.

What each file holds, in the order a text passes: sage.lark and text (the grammar), settings (what
statements take), syntax (the program), parser, complaints and errors (text to program, and what to
say where it is none); strategies, expressions and checking (the rules of strategies, and whether
their units go together); models, devices, instances, sizes and resolution (what its names mean);
traces and workload (its requests as rows); lowering (to the dialects), prompts (to requests with
token ids); printer (the canonical text).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagec.language.parser import parse

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

    from sagec.language.syntax import Program
    from sagec.runtime.request import Request

__all__ = ["format", "lower", "parse", "requests"]


def lower(program: Program) -> ModuleOp:
    """The module of a program: cluster ops, and `pd.graph @serve` where it serves something.

    Ops carry their place in the .sage text. Raises Diagnostic.
    """
    from sagec.language.lowering import lower_program

    return lower_program(program)


def requests(program: Program, *, counted: bool = False) -> list[Request]:
    """The requests of a program with their prompts' token ids; none where it serves nothing.

    counted: prompts that are no text are any tokens, a range for each; what requests share of
    them, their `block_hashes` say. Raises Diagnostic.
    """
    if program.serve is None:
        return []
    from sagec.language.prompts import requests_of
    from sagec.language.resolution import resolve
    from sagec.language.workload import workload

    return requests_of(workload(resolve(program)), counted=counted)


def format(text: str, name: str = "<text>") -> str:
    """The canonical text of a program; comments stay. Raises Diagnostic where it does not parse."""
    from sagec.language.printer import print_program

    return print_program(parse(text, name))
