"""The probe reads from the gradient by how much a cross entropy was divided, and knows when it cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_attrib.capture.denominator import DenominatorProbe, count_targets


def _logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def _causal(batch: int, length: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels with the first half of each row ignored, and the summed loss."""
    logits, labels = _logits(batch, length, classes), torch.randint(0, classes, (batch, length))
    labels[:, : length // 2] = -100
    return logits, labels, F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")


@given(st.floats(0.5, 5000), st.integers(1, 4), st.integers(2, 9), st.integers(2, 40))
@settings(deadline=None, max_examples=40)
def test_any_divisor_of_a_causal_loss_is_measured(divisor: float, batch: int, length: int, classes: int) -> None:
    logits, labels, loss = _causal(batch, length, classes)
    probe = DenominatorProbe.watch({"logits": logits}, labels)
    (loss / divisor).backward()
    assert probe.result() == pytest.approx(divisor, rel=1e-3)


def test_class_labels_and_attribute_outputs_are_measured() -> None:
    logits, labels = _logits(6, 4), torch.randint(0, 4, (6,))
    probe = DenominatorProbe.watch(SimpleNamespace(logits=logits), labels)
    F.cross_entropy(logits, labels).backward()
    assert probe.result() == pytest.approx(6, rel=1e-5)


def test_log_probabilities_of_a_fused_head_are_measured() -> None:
    """Half of the tokens do not count."""
    log_probs = torch.randn(3, 8).requires_grad_()
    probe = DenominatorProbe.watch({"log_probs": log_probs, "logits": None}, None)
    (-(log_probs * (torch.arange(8) > 3)).sum() / 12).backward()
    assert probe.result() == pytest.approx(12)


@pytest.mark.parametrize("loss", ["smoothed", "weighted", "regression", "preference"])
def test_other_losses_are_known_to_be_unknown(loss: str) -> None:
    logits, labels, _ = _causal(3, 6, 11)
    flat, targets = logits[:, :-1].transpose(1, 2), labels[:, 1:]
    probe = DenominatorProbe.watch({"logits": logits}, labels)
    log_p = logits.log_softmax(-1)[..., 0].sum(1)
    {
        "smoothed": lambda: F.cross_entropy(flat, targets, label_smoothing=0.2),
        "weighted": lambda: F.cross_entropy(flat, targets) + 0.5 * logits.square().mean(),
        "regression": lambda: logits.square().mean(),
        "preference": lambda: -F.logsigmoid(log_p[0] - log_p[1]),
    }[loss]().backward()
    assert probe.result() is None


def test_without_a_backward_pass_or_logits_nothing_is_known() -> None:
    logits, labels, _ = _causal(2, 4, 5)
    assert DenominatorProbe.watch({"logits": logits}, labels).result() is None
    assert DenominatorProbe.watch({"logits": logits.detach()}, labels) is None
    assert DenominatorProbe.watch({"logits": logits}, None) is None
    assert DenominatorProbe.watch({"logits": logits}, torch.rand(2, 4)) is None
    assert DenominatorProbe.watch(torch.zeros(2), labels) is None


def test_targets_are_counted_after_the_shift() -> None:
    labels = torch.tensor([[5, 6, 7], [5, -100, 7], [5, -100, -100]])
    assert count_targets(labels).tolist() == [2, 1, 0]
    assert count_targets(torch.tensor([1, 2])) is None
    assert count_targets(torch.rand(2, 2)) is None
