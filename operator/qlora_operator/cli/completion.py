"""What shells need to complete the `qlora` command, made of its own parser: static, so that a Tab costs nothing."""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class _Subcommand:
    name: str
    help: str
    options: Sequence[argparse.Action]
    words: Sequence[str]
    """Of its positional arguments; without any they are files."""


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The completion script for one of SHELLS."""
    subcommands = list(_subcommands(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](subcommands)


def _subcommands(parser: argparse.ArgumentParser) -> Iterator[_Subcommand]:
    action = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    helps = {each.dest: each.help or "" for each in action._choices_actions}
    for name, sub in action.choices.items():
        positional = [each for each in sub._actions if not each.option_strings]
        words = [str(word) for each in positional for word in each.choices or ()]
        yield _Subcommand(
            name, helps.get(name, ""), [each for each in sub._actions if each.option_strings], words
        )


def _choices(option: argparse.Action) -> str:
    return " ".join(map(str, option.choices or ()))


def _takes_value(option: argparse.Action) -> bool:
    return option.nargs != 0


def _bash(subcommands: Sequence[_Subcommand]) -> str:
    cases = []
    for sub in subcommands:
        flags = " ".join(flag for option in sub.options for flag in option.option_strings)
        choices = [
            f"{'|'.join(option.option_strings)}) words={shlex.quote(_choices(option))};;"
            for option in sub.options
            if option.choices
        ]
        files = [flag for option in sub.options if _takes_value(option) and not option.choices
                 for flag in option.option_strings]  # fmt: skip
        positional = f"words={shlex.quote(' '.join(sub.words))}" if sub.words else "files=1"
        cases.append(
            f"    {sub.name})\n"
            f'      case "$before" in\n'
            + "".join(f"        {choice}\n" for choice in choices)
            + (f"        {'|'.join(files)}) files=1;;\n" if files else "")
            + f'        *) if [[ "$current" == -* ]]; then words={shlex.quote(flags)}; else {positional}; fi;;\n'
            f"      esac;;\n"
        )
    names = " ".join(sub.name for sub in subcommands)
    return (
        "# bash completion of qlora\n"
        "_qlora() {\n"
        '  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words="" files=""\n'
        "  if (( COMP_CWORD == 1 )); then\n"
        f'    COMPREPLY=($(compgen -W "{names} --help --version" -- "$current"))\n'
        "    return\n"
        "  fi\n"
        '  case "${COMP_WORDS[1]}" in\n' + "".join(cases) + "  esac\n"
        '  if [[ -n "$files" ]]; then\n'
        '    compopt -o filenames 2>/dev/null\n'
        '    mapfile -t COMPREPLY < <(compgen -f -- "$current")\n'
        "  else\n"
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))\n'
        "  fi\n"
        "}\n"
        "complete -F _qlora qlora"
    )  # fmt: skip


def _zsh_text(text: str) -> str:
    """Help for a description in brackets of _arguments."""
    for character in "\\[]:'":
        text = text.replace(character, {"'": ""}.get(character, f"\\{character}"))
    return text


def _zsh(subcommands: Sequence[_Subcommand]) -> str:
    commands = "\n".join(f"    '{sub.name}:{_zsh_text(sub.help)}'" for sub in subcommands)
    cases = []
    for sub in subcommands:
        specs = []
        for option in sub.options:
            text = _zsh_text(option.help or "")
            value = (
                f":value:({_choices(option)})"
                if option.choices
                else ":value:_files"
                if _takes_value(option)
                else ""
            )
            specs += [f"'*{flag}[{text}]{value}'" for flag in option.option_strings]
        specs.append(f"'*:word:({' '.join(sub.words)})'" if sub.words else "'*:file:_files'")
        cases.append(f"    {sub.name}) _arguments {' '.join(specs)};;")
    return (
        "#compdef qlora\n"
        "local -a commands\n"
        f"commands=(\n{commands}\n)\n"
        "if (( CURRENT == 2 )); then\n"
        "  _describe command commands\n"
        "else\n"
        "  shift words; (( CURRENT-- ))\n"
        '  case "$words[1]" in\n' + "\n".join(cases) + "\n  esac\nfi"
    )


def _fish(subcommands: Sequence[_Subcommand]) -> str:
    lines = ["# fish completion of qlora"]
    for sub in subcommands:
        lines.append(f"complete -c qlora -n __fish_use_subcommand -f -a {sub.name} -d {_fish_text(sub.help)}")
        when = f"-n '__fish_seen_subcommand_from {sub.name}'"
        if sub.words:
            lines.append(f"complete -c qlora {when} -f -a {_fish_text(' '.join(sub.words))}")
        for option in sub.options:
            flags = " ".join(
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                for flag in option.option_strings
            )
            value = (
                f" -x -a {_fish_text(_choices(option))}"
                if option.choices
                else " -r"
                if _takes_value(option)
                else ""
            )
            lines.append(f"complete -c qlora {when} {flags}{value} -d {_fish_text(option.help or '')}")
    return "\n".join(lines)


def _fish_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
