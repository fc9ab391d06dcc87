"""The command line as a whole: help, exit codes, errors, frozen flags, completion in a real bash."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer_attrib.cli import main, make_parser
from trainer_attrib.command_line.command import EXIT_CODES, print_json
from trainer_attrib.command_line.completion import HOW, flags
from trainer_attrib.ledger.reader import Ledger
from trainer_attrib.testing.zoo import PlainLinear

FLAGS = Path(__file__).with_name("command_line_flags.txt")
UPDATE = "python -m tests.test_cli"


def commands():
    [found] = [action for action in make_parser()._actions if action.choices]
    return found.choices


def flag_lines() -> str:
    """Every option of every command, a line each."""
    return "".join(f"{name} {flag.name}\n" for name, parser in commands().items() for flag in flags(parser))


def test_without_arguments_it_says_what_there_is(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert "trainer-attrib demo " in printed
    assert all(f"\n    {name} " in printed or f"\n    {name}\n" in printed for name in commands())
    assert EXIT_CODES in printed


@pytest.mark.parametrize("command", commands())
def test_the_help_of_a_command_has_an_example_and_the_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"example:\n  trainer-attrib {command} " in printed
    assert EXIT_CODES in printed
    assert "--json" in printed


def test_the_flags_are_frozen():
    """A flag that changes breaks somebody's script."""
    assert flag_lines() == FLAGS.read_text(), (
        f"flags changed; if that is meant, run: {UPDATE}, and say it in CHANGELOG.md"
    )


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_errors_come_without_a_traceback(tmp_path, capsys, command):
    assert main([command, str(tmp_path / "nothing")]) == 2
    printed = capsys.readouterr().err
    assert "No ledger at" in printed
    assert "Next step:" in printed
    assert "Traceback" not in printed


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError, match="No ledger at"):
        main(["inspect", "--debug", str(tmp_path / "nothing")])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "weights.bin"), "weights.bin: No such file or directory."),
        (PermissionError(13, "Permission denied", "part"), "part: Permission denied."),
        (OSError("the disk is gone"), "OSError: the disk is gone"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (ZeroDivisionError(), "ZeroDivisionError: without a message"),
    ],
)
def test_errors_of_others_are_told_without_a_traceback(monkeypatch, capsys, error, said):
    monkeypatch.setattr(Ledger, "__init__", lambda self, place: (_ for _ in ()).throw(error))
    assert main(["verify", "runs"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"trainer-attrib verify: {said}")
    assert "Next step:" in printed
    assert "Traceback" not in printed
    with pytest.raises(type(error)):
        main(["verify", "runs", "--debug"])


def test_what_does_not_exist_is_wrong_use(capsys):
    for arguments in (["inspekt"], ["inspect"], ["inspect", "runs", "--jsn"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "usage: trainer-attrib" in capsys.readouterr().err


def test_an_interrupt_is_one_line_and_130(monkeypatch, capsys):
    monkeypatch.setattr(Ledger, "__init__", lambda self, place: signal.raise_signal(signal.SIGINT))
    assert main(["verify", "runs"]) == 130
    assert capsys.readouterr().err == "trainer-attrib verify: interrupted\n"


@pytest.fixture
def ledger(train, tmp_path):
    train(PlainLinear(), tmp_path / "ledger")
    return tmp_path / "ledger"


def test_a_sound_ledger_and_one_with_problems(ledger, capsys):
    assert main(["verify", str(ledger), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stages": ["one"], "problems": []}
    assert main(["inspect", str(ledger), "--json"]) == 0
    assert '"one"' in capsys.readouterr().out
    part = max((path for path in ledger.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:-1])
    assert main(["verify", str(ledger)]) == 1
    assert part.name in capsys.readouterr().out


def test_a_reader_that_had_enough_is_no_error(ledger):
    code = f"from trainer_attrib.cli import main; import sys; sys.exit(main(['inspect', {str(ledger)!r}]))"
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_json_has_no_words_that_json_lacks(capsys):
    print_json({"a": math.nan, "b": [math.inf, 1.5, (2, "x")], 3: None})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5, [2, "x"]], "3": None}


def completed(*words: str, cwd: Path) -> list[str]:
    """What a bash that has read the script proposes for the last word."""
    script = subprocess.run(
        [sys.executable, "-m", "trainer_attrib", "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    line = " ".join(f"'{word}'" for word in ("trainer-attrib", *words))
    ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _trainer_attrib; printf "%s\\n" "${{COMPREPLY[@]}}"'
    ran = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True, cwd=cwd)
    assert ran.stderr == ""
    return [line for line in ran.stdout.splitlines() if line]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_choices_and_files(tmp_path):
    (tmp_path / "my run").mkdir()
    assert completed("in", cwd=tmp_path) == ["inspect", "influence"]
    assert completed("", cwd=tmp_path) == [*commands(), "--help", "--version"]
    assert completed("verify", "--", cwd=tmp_path) == ["--help", "--json", "--debug"]
    assert completed("sketch", "--sn", cwd=tmp_path) == ["--snapshots"]
    assert completed("verify", "my", cwd=tmp_path) == ["my run"]
    assert completed("sketch", "--data", "", cwd=tmp_path) == ["my run"]
    assert completed("completion", "f", cwd=tmp_path) == ["fish"]


@pytest.mark.parametrize("shell", HOW)
def test_completion_scripts_have_every_command_and_option(shell, capsys):
    assert main(["completion", shell, "--json"]) == 0
    script = json.loads(capsys.readouterr().out)["script"]
    for name, parser in commands().items():
        assert name in script
        assert all((f"-l {flag.name[2:]}" if shell == "fish" else flag.name) in script for flag in flags(parser))
    if found := shutil.which(shell):
        checked = subprocess.run([found, "-n"], input=script, capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


if __name__ == "__main__":
    FLAGS.write_text(flag_lines())
