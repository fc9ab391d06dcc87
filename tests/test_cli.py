from __future__ import annotations

import pytest

from trainer_attrib.cli import main


def test_no_arguments_help(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


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


def test_the_flags_are_frozen(capsys):
    """A flag that changes breaks somebody's script."""
    flags = {}
    for command in ("demo", "influence", "inspect", "sketch", "verify"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        words = capsys.readouterr().out.translate(str.maketrans(",[]();", "      ")).split()
        flags[command] = sorted({word for word in words if word.startswith("--")})
    assert flags == {
        "demo": ["--debug", "--help", "--json", "--out", "--seed"],
        "influence": [
            "--batch-size",
            "--clean",
            "--data",
            "--debug",
            "--held-out",
            "--help",
            "--json",
            "--model",
            "--prompt",
            "--queries",
            "--recipe",
            "--right",
            "--stage",
            "--top",
            "--verify",
            "--wrong",
        ],
        "inspect": ["--debug", "--help", "--json"],
        "sketch": ["--batch-size", "--data", "--debug", "--help", "--json", "--model", "--snapshots", "--stage"],
        "verify": ["--debug", "--help", "--json"],
    }
