"""What a pass for rows costs beside a plain forward and backward pass over the same examples.

Rows of given examples at given weights need no weight's gradient, which a plain backward pass forms: a third of its
work. CPU time of the process. The passes take turns a quarter of the examples at a time, so that a machine which slows
down slows both; median ratio and its standard error over all turns.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import report
import torch
from pass_work import ratios
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from trainer_attrib import Examples, SketchConfig
from trainer_attrib.analysis.gradient_rows import GradientRows
from trainer_attrib.numerics.second_moment import factor
from trainer_attrib.tap.plan import plan_sketch
from trainer_attrib.tap.projections import Projections

BAR = 0.95
FAR_OFF = 1.0, 1.1
"""What fails a quick run, on any machine: with the weights' gradients formed again a pass takes 1.02 and 1.27."""
RANK = 16
PARTS = 4  # of the examples, one per turn


def language_model() -> tuple[nn.Module, Examples]:
    """GPT-2 of 4 layers, width 256; texts of 64 to 128 tokens, of similar length together."""
    config = GPT2Config(
        vocab_size=2048, n_positions=128, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(64, 129, (64,), generator=generator).tolist()
    texts = [" ".join(map(str, torch.randint(0, 2048, (n,), generator=generator).tolist())) for n in lengths]
    return GPT2LMHeadModel(config), Examples.of_texts(texts, _numbers, batch_size=8)


def perceptron() -> tuple[nn.Module, Examples]:
    """Two hidden layers of 512; 4096 inputs of 784."""
    layers = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(4096, 784, generator=generator), torch.randint(0, 10, (4096,), generator=generator)
    return nn.Sequential(*layers), Examples.of_classes(inputs, labels, batch_size=64)


def main() -> None:
    options = report.parser((__doc__ or "").splitlines()[0]).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows, checks = [], {}
    # One round is noisy: the quick run spends all its time on the rows that are checked.
    corrections, counts = (("factored",), (6, 36)) if options.quick else (("none", "factored"), (25, 60))
    failed = False
    for make, rounds, far_off in zip((language_model, perceptron), counts, FAR_OFF, strict=True):
        model, examples = make()
        for correction in corrections:
            row = measured(model.eval(), examples, correction, rounds)
            rows.append({"model": make.__name__.replace("_", " "), **row})
        checks[f"{rows[-1]['model']}, corrected rows"] = report.check(rows[-1]["ratio"], BAR)
        failed |= rows[-1]["ratio"] > (far_off if options.quick else BAR)
    report.publish("pass_cost", rows, checks, quick=options.quick)
    if failed:
        raise SystemExit("a pass costs more than it should: are gradients of weights formed again?")


def measured(model: nn.Module, examples: Examples, correction: str, rounds: int) -> dict[str, Any]:
    """Ratio of the two passes over the same examples."""
    plan = plan_sketch(model, SketchConfig(rank=RANK))
    parameters = dict(model.named_parameters())
    factors = {w.name: factor(w.matrix_of(parameters[w.name].detach()).square() + 1e-4) for w in plan.weights}
    if correction == "factored":
        factors = {w.name: _with_bias(w, *factors[w.name]) for w in plan.weights}
    projections = Projections(plan, model, factors if correction == "factored" else None, 1)

    def plain(batches: list[list[int]]) -> None:
        for batch in batches:
            examples.loss(model, examples.items(batch)).sum().backward()
            model.zero_grad()

    def rows(batches: list[list[int]]) -> None:
        with GradientRows(model, projections).opened() as opened:
            for batch in batches:
                opened.of_losses(examples, batch).half()

    batches = list(examples.batches())
    parts = [batches[part::PARTS] for part in range(PARTS)]
    again, mine = ratios([(partial(plain, part), {"rows": partial(rows, part)}) for part in parts], rounds)
    return {
        "rows": correction,
        "ratio": mine["ratio"],
        "±": mine["±"],
        "plain again": again["ratio"],
        "bytes per example": 2 * plan.width,
    }


def _with_bias(weight: Any, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments as a stage records them: of the weight with its bias."""
    if not weight.bias:
        return rows, columns
    one = torch.full((1,), 1e-4)
    return (rows, torch.cat([columns, one])) if weight.bias_axis == 1 else (torch.cat([rows, one]), columns)


def _numbers(text: str) -> dict[str, list[int]]:
    return {"input_ids": [int(word) for word in text.split()]}


if __name__ == "__main__":
    main()
