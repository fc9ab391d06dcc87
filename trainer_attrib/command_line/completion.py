"""``completion``: scripts for bash, zsh and fish, written from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from trainer_attrib.command_line.command import DONE, Commands, add_command, print_json

PROGRAM = "trainer-attrib"
HOW = {
    "bash": f'eval "$({PROGRAM} completion bash)"   # in ~/.bashrc',
    "zsh": f'eval "$({PROGRAM} completion zsh)"   # in ~/.zshrc, after compinit',
    "fish": f"{PROGRAM} completion fish | source   # in ~/.config/fish/config.fish",
}


@dataclass(frozen=True)
class Flag:
    """An option of a command: its long name, whether a value follows, which ones can (none: anything, such as a file),
    and its help."""

    name: str
    valued: bool
    choices: tuple[str, ...]
    what: str


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "completion", "print a script that completes commands and options in a shell",
        lambda options: _completion(options, commands), "completion bash >> ~/.bashrc",
    )  # fmt: skip
    parser.add_argument("shell", choices=tuple(HOW))


def _completion(options: argparse.Namespace, commands: Commands) -> int:
    script = SCRIPTS[options.shell](commands)
    print_json({"shell": options.shell, "script": script}) if options.json else print(script)
    return DONE


def flags(parser: argparse.ArgumentParser) -> Iterator[Flag]:
    """Of a command, in the order of its help."""
    for action in parser._actions:
        for name in action.option_strings:
            if name.startswith("--"):
                what = (action.help or "").partition(" (default")[0]
                yield Flag(name, action.nargs != 0, tuple(map(str, action.choices or ())), what)


def operands(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """Choices of a command's argument; empty where it is a file or has none."""
    found = [a.choices for a in parser._actions if not a.option_strings and a.choices]
    return tuple(map(str, found[0])) if found else ()


def bash(commands: Commands) -> str:
    """Completes by ``compgen``: commands, options, choices of the option before, else files."""
    cases, choices = [], []
    for name, parser in commands.choices.items():
        found = list(flags(parser))
        words = " ".join([*(flag.name for flag in found), *operands(parser)])
        cases.append(f'    {name}) words="{words}" ;;')
        reply = 'COMPREPLY=( $(compgen -W "{}" -- "$current") ); return ;;'
        choices += [f"    {name}:{f.name}) {reply.format(' '.join(f.choices))}" for f in found if f.choices]
        files = "|".join(f"{name}:{flag.name}" for flag in found if flag.valued and not flag.choices)
        choices += [f'    {files}) words="" ;;'] if files else []
    lines = [
        f"# {HOW['bash']}",
        "_trainer_attrib() {",
        '  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f'    COMPREPLY=( $(compgen -W "{" ".join(commands.choices)} --help --version" -- "$current") )',
        "    return",
        "  fi",
        '  case "${COMP_WORDS[1]}" in',
        *cases,
        "  esac",
        '  case "${COMP_WORDS[1]}:$before" in',
        *choices,
        "  esac",
        '  COMPREPLY=( $(compgen -W "$words" -- "$current") )',
        "  local IFS=$'\\n'",  # names of files may have spaces
        '  case "$current" in -*) ;; *) COMPREPLY+=( $(compgen -f -- "$current") ) ;; esac',
        "}",
        f"complete -o filenames -F _trainer_attrib {PROGRAM}",
    ]
    return "\n".join(lines)


def zsh(commands: Commands) -> str:
    """Completes by ``_describe`` and ``_arguments``."""
    described = [f"    {_quoted(f'{name}:{parser.description}')}" for name, parser in commands.choices.items()]
    lines = [f"# {HOW['zsh']}", "_trainer_attrib() {", "  local -a commands", "  commands=(", *described, "  )"]
    lines += ["  if (( CURRENT == 2 )); then _describe command commands; return; fi"]
    lines += ["  shift words; (( CURRENT-- ))", "  case $words[1] in"]
    for name, parser in commands.choices.items():
        given = [_quoted(_zsh_flag(flag)) for flag in flags(parser)]
        chosen = operands(parser)
        given.append(_quoted(f"*::: :({' '.join(chosen)})" if chosen else "*:file:_files"))
        lines.append(f"    {name}) _arguments {' '.join(given)} ;;")
    return "\n".join([*lines, "  esac", "}", f"compdef _trainer_attrib {PROGRAM}"])


def fish(commands: Commands) -> str:
    """Completes by one ``complete`` for each option."""
    none, lines = "not __fish_seen_subcommand_from " + " ".join(commands.choices), [f"# {HOW['fish']}"]
    for name, parser in commands.choices.items():
        lines.append(f"complete -c {PROGRAM} -n {_quoted(none)} -f -a {name} -d {_quoted(parser.description)}")
        seen = _quoted(f"__fish_seen_subcommand_from {name}")
        for flag in flags(parser):
            value = f" -x -a {_quoted(' '.join(flag.choices))}" if flag.choices else " -r" * flag.valued
            lines.append(f"complete -c {PROGRAM} -n {seen} -l {flag.name[2:]}{value} -d {_quoted(flag.what)}")
        if chosen := operands(parser):
            lines.append(f"complete -c {PROGRAM} -n {seen} -f -a {_quoted(' '.join(chosen))}")
    return "\n".join(lines)


def _zsh_flag(flag: Flag) -> str:
    what = "".join(f"\\{letter}" if letter in "[]:\\" else letter for letter in flag.what)
    action = f"({' '.join(flag.choices)})" if flag.choices else "_files"
    return f"{flag.name}[{what}]" + (f":value:{action}" if flag.valued else "")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
