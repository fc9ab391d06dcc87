"""The benchmarks' packages of data: nothing but the pinned bytes is read, and archives are read in place."""

from __future__ import annotations

import hashlib
import sys

import pytest

from benchmarks.offline_data import Package, _data_of_deb, cache
from trainer_attrib.errors import ConfigurationError

BYTES = b"the data"
WRITE = "import sys; open('downloaded', 'wb').write(sys.argv[1].encode())"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINER_ATTRIB_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def package(*command: str) -> Package:
    return Package("kept.whl", hashlib.sha256(BYTES).hexdigest(), command)


def test_a_download_is_kept_under_its_name(folder):
    path = package(sys.executable, "-c", WRITE, BYTES.decode()).path()
    assert path == folder / "kept.whl"
    assert path.read_bytes() == BYTES
    assert [p.name for p in folder.iterdir()] == ["kept.whl"]


def test_a_file_put_there_by_hand_is_not_downloaded(folder):
    folder.mkdir()
    (folder / "kept.whl").write_bytes(BYTES)
    assert package("no-such-tool").path() == cache() / "kept.whl"


def test_other_bytes_are_refused_and_not_kept(folder):
    with pytest.raises(ConfigurationError, match="has the sha256"):
        package(sys.executable, "-c", WRITE, "others").path()
    assert not (folder / "kept.whl").exists()
    (folder / "kept.whl").write_bytes(b"damaged")
    with pytest.raises(ConfigurationError, match="delete the file"):
        package("no-such-tool").path()


@pytest.mark.parametrize("command", [("no-such-tool",), (sys.executable, "-c", "raise SystemExit('no route')")])
def test_what_the_tool_said_is_told(command):
    said = "is not installed" if command[0] == "no-such-tool" else "no route"
    with pytest.raises(ConfigurationError, match=said):
        package(*command).path()


def test_the_data_of_a_debian_package(tmp_path):
    def member(name: str, content: bytes) -> bytes:
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        return head.encode() + content + b"\n" * (len(content) % 2)

    path = tmp_path / "package.deb"
    path.write_bytes(b"!<arch>\n" + member("debian-binary", b"2.0") + member("data.tar.xz/", BYTES) + member("x", b"y"))
    assert _data_of_deb(path).read() == BYTES
