"""say what this machine can run, and what is missing"""

from __future__ import annotations

import argparse

EPILOG = """examples:
  sagec doctor
  sagec doctor --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only how to print."""
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Print the findings, and the commands that would add what is missing."""
    from sagec.cli import machine, writing

    found = machine.findings()
    if args.json:
        writing.print_json(machine.as_json(found))
        return 0
    out = writing.console()
    group = ""
    for finding in found:
        if finding.group != group:
            group = finding.group
            out.print(f"[bold]{group}[/bold]")
        mark = "[green]ok[/green]" if finding.here else "[yellow]--[/yellow]"
        out.print(f"  {mark} {finding.name:<21} ", end="")
        out.print(finding.detail, markup=False)
    remedies = dict.fromkeys(finding.remedy for finding in found if finding.remedy)
    if remedies:
        out.print("[bold]to add what is missing[/bold]")
        for remedy in remedies:
            out.print(f"  {remedy}", markup=False)
    return 0
