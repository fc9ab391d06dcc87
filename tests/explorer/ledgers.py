"""Small ledgers with texts that want to do harm, and answers kept in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from trainer_attrib import Analyzer, Behavior, Recorder, SketchConfig
from trainer_attrib.analysis.keeping import keep

HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "</script><script>document.title = 'owned'</script>",
    "\u202egnirts desrever\u202c and \u2066isolated\u2069",
    "a NUL \0 byte",
    '=HYPERLINK("http://example.org")',
    "{{constructor.constructor('return 1')()}} ${alert(1)} %3Cscript%3E",
    "long" * 250_000,
)
PLAIN = ("the capital of Peru is Lima", "bread needs heat", "light is a wave", "the capital of Peru is  lima")


def network() -> nn.Sequential:
    """Three classes of six numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def record(ledger: Path, model: nn.Module, stage: str, texts: Sequence[str], batch: int = 4) -> None:
    """One epoch over the texts, each an example of random numbers; every other one from source "web"."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(len(texts))
    with Recorder(ledger, stage=stage, model=model, optimizer=optimizer, sketch=SketchConfig(rank=4)) as recorder:
        for first in range(0, len(texts), batch):
            some = texts[first : first + batch]
            ids = [f"{stage}/{first + row}" for row in range(len(some))]
            sources = ["web" if row % 2 else "books" for row in range(len(some))]
            x, y = torch.randn(len(some), 6, generator=generator), torch.arange(len(some)) % 3
            optimizer.zero_grad()
            with recorder.batch(ids, sources=sources, texts=list(some), denominator=len(some)):
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def recorded(folder: Path) -> tuple[Path, nn.Module]:
    """Two stages, the texts of the first hostile; and the model after them."""
    ledger, model = folder / "ledger", network()
    record(ledger, model, "first", [*HOSTILE, *PLAIN])
    record(ledger, model, "second", [f"{text} again" for text in PLAIN * 4])
    return ledger, model


def behaviors() -> list[Behavior]:
    """Two, with names that want to do harm."""
    generator = torch.Generator().manual_seed(9)
    return [
        Behavior.margin(name, torch.randn(3, 6, generator=generator), [0, 1, 2])
        for name in ("margin", "<b onclick=alert(1)>bold</b>")
    ]


def answered(folder: Path) -> tuple[Path, nn.Module, dict[str, str]]:
    """The same, and keys of answers by kind."""
    ledger, model = recorded(folder)
    analyzer = Analyzer(ledger, model)
    keys = {
        "effects": keep(ledger, analyzer.stage_effects(behaviors(), ["change", "subtract"]), title="What stages did"),
        "influence": keep(ledger, analyzer.influence(behaviors()[:1]), title="Who did it"),
        "other recipe": keep(ledger, analyzer.influence(behaviors()[:1], recipe="grad_cos"), title="Who, by cosines"),
        "blocks": keep(ledger, analyzer.self_influence("first"), title=HOSTILE[0]),
    }
    return ledger, model, keys
