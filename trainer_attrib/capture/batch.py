"""What a forward pass over a training batch tells: how many rows, which content, what labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainer_attrib.capture.denominator import DenominatorProbe, count_targets
from trainer_attrib.capture.example_ids import hash_rows, pair_hashes
from trainer_attrib.capture.window import Known, MicroBatch
from trainer_attrib.tap.module_tap import ModuleTap
from trainer_attrib.types import Layout

_CONTENT = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


def open_micro_batch(
    tap: ModuleTap, args: tuple[Any, ...], kwargs: dict[str, Any], known: Known, layout: Layout, *, keep_inputs: bool
) -> MicroBatch | None:
    """Start recording a forward pass called with these arguments; None if they hold no batch."""
    content = batch_content(args, kwargs)
    if content is None or content.shape[0] == 0:
        return None
    if known.ids is not None and content.shape[0] == 2 * len(known.ids):
        layout = Layout.PAIRS  # the caller counts examples, the forward pass their two sides
    mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
    mask = mask if isinstance(mask, Tensor) and mask.shape == content.shape else None
    hashes = hash_rows(content, mask, labels if isinstance(labels, Tensor) else None)
    text = keep_inputs and content.dim() == 2 and not content.is_floating_point()
    return MicroBatch(
        record=tap.open(content.shape[0], layout),
        known=known,
        hashes=pair_hashes(hashes) if layout is Layout.PAIRS else hashes,
        tokens=count_targets(labels),
        inputs=content.detach().clone() if text else None,
        mask=mask.detach().clone() if text and mask is not None else None,
        declared=kwargs.get("num_items_in_batch"),
    )


def watch_output(micro_batch: MicroBatch, kwargs: dict[str, Any], output: Any) -> None:
    """Attach the denominator probe to what the forward pass returned."""
    if micro_batch.record.layout is Layout.ROWS:
        micro_batch.probe = DenominatorProbe.watch(output, kwargs.get("labels"))


def batch_content(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that identifies the batch's examples: the model's main input."""
    named = [kwargs[name] for name in _CONTENT if isinstance(kwargs.get(name), Tensor)]
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() >= 1]
    return next(iter([*named, *tensors]), None)
