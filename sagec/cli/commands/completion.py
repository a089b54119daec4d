"""print the completion script of a shell"""

from __future__ import annotations

import argparse
from typing import NamedTuple

EPILOG = """examples:
  sagec completion bash > ~/.local/share/bash-completion/completions/sagec
  sagec completion zsh > "${fpath[1]}/_sagec"
  sagec completion fish > ~/.config/fish/completions/sagec.fish
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace) -> int:
    """Print the script; it is written from the argument tree, so it never goes stale."""
    from sagec.cli.arguments import subparsers, tree

    commands = {name: _words(parser) for name, parser in subparsers(tree()).items()}
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](commands), end="")
    return 0


class Word(NamedTuple):
    """An option, or with no spellings an argument; choices are empty where anything goes."""

    spellings: tuple[str, ...]
    text: str
    choices: tuple[str, ...]


Words = dict[str, list[Word]]


def _words(parser: argparse.ArgumentParser) -> list[Word]:
    return [
        Word(
            tuple(action.option_strings),
            "".join(letter for letter in action.help or "" if letter not in "'\"`[]:\\$"),
            tuple(map(str, action.choices or ())),
        )
        for action in parser._actions
    ]


def _bash(commands: Words) -> str:
    cases = []
    for name, words in commands.items():
        for word in words:
            if word.spellings and word.choices:
                keys = "|".join(f'"{name} {spelling}"' for spelling in word.spellings)
                cases.append(f'    {keys}) words="{" ".join(word.choices)}" ;;')
        every = [option for word in words for option in word.spellings or word.choices]
        cases.append(f'    "{name} "*) words="{" ".join(every)}" ;;')
    return _BASH.format(names=" ".join(commands), cases="\n".join(cases))


def _zsh(commands: Words) -> str:
    cases = []
    for name, words in commands.items():
        specs = []
        for word in words:
            values = f":value:({' '.join(word.choices)})" if word.choices else ""
            specs += [f"'{spelling}[{word.text}]{values}'" for spelling in word.spellings]
            if not word.spellings:
                specs.append(f"'1{values}'" if values else "'*:file:_files'")
        cases.append(f"    {name}) _arguments {' '.join(specs)} ;;")
    return _ZSH.format(names=" ".join(commands), cases="\n".join(cases))


def _fish(commands: Words) -> str:
    none = "not __fish_seen_subcommand_from " + " ".join(commands)
    lines = ["# fish completion for sagec"]
    lines += [f"complete -c sagec -f -n '{none}' -a {name}" for name in commands]
    for name, words in commands.items():
        seen = f"complete -c sagec -n '__fish_seen_subcommand_from {name}'"
        for word in words:
            values = f" -x -a '{' '.join(word.choices)}'" if word.choices else ""
            spellings = "".join(
                f" -l {option[2:]}" if option.startswith("--") else f" -s {option[1:]}"
                for option in word.spellings
            )
            if spellings or values:
                lines.append(f"{seen}{spellings}{values} -d '{word.text}'")
    return "\n".join(lines) + "\n"


_BASH = """\
# bash completion for sagec
_sagec() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{names} --help --version" -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}} $previous" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  case "$current" in -*) ;; *) COMPREPLY+=($(compgen -f -- "$current")) ;; esac
}}
complete -o filenames -F _sagec sagec
"""

_ZSH = """\
#compdef sagec
_sagec() {{
  if (( CURRENT == 2 )); then
    compadd {names} --help --version
    return
  fi
  local command="$words[2]"
  shift words
  (( CURRENT-- ))
  case "$command" in
{cases}
  esac
}}
_sagec "$@"
"""
