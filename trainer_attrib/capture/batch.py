"""Which forward passes are recorded, and what the batch tells about them: how many rows, which content, what labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer_attrib.capture.denominator import DenominatorProbe, count_targets
from trainer_attrib.capture.example_ids import IGNORED, hash_rows, side_hashes
from trainer_attrib.capture.messages import logger
from trainer_attrib.capture.window import Known, MicroBatch, ids_given
from trainer_attrib.errors import CaptureError
from trainer_attrib.tap.hooks import Untraced
from trainer_attrib.tap.module_tap import ModuleTap
from trainer_attrib.tap.segments import Segments
from trainer_attrib.types import Layout, LossForm

_CONTENT = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


class BatchWatch:
    """Opens a record for every micro-batch that training will backpropagate.

    A forward pass of the model opens one from its arguments. A loop whose training step may call submodules instead
    hands over the batch: one record then takes all forward passes of the block, and a new one those after a step.

    Args:
        model: its forward is watched, and the outputs of its direct submodules where the batch was handed over.
        tap: what records.
        loss: how the loss is made of examples.
        texts: whether inputs are kept for their text.
        wanted: whether the current step is captured.
        add: takes each opened micro-batch.
        attempt: runs recording work so that a fault in it does not end training.
    """

    def __init__(
        self,
        model: nn.Module,
        tap: ModuleTap,
        loss: LossForm,
        *,
        texts: bool,
        wanted: Callable[[], bool],
        add: Callable[[MicroBatch], None],
        attempt: Callable[[Callable[[], object]], None],
    ) -> None:
        self._model, self._tap, self._loss, self._texts = model, tap, loss, texts
        self._wanted, self._add, self._attempt = wanted, add, attempt
        self._known: Known | None = None  # set inside a block
        self._content: Any = None  # the batch that the block was given
        self._whole: MicroBatch | None = None  # what takes every forward pass of the block
        self._newest: MicroBatch | None = None
        self._muted = False
        self._misfit = False  # ids that did not fit were reported
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Register the hooks."""
        before, after = Untraced(self._before_forward), Untraced(self._after_forward)
        self._handles.append(self._model.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        for module in (self._model, *self._model.children()):
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Forward passes inside are none of training's."""
        record, self._tap.record, self._muted = self._tap.record, None, True
        try:
            yield
        finally:
            self._tap.record, self._muted = record, False

    @contextmanager
    def block(self, known: Known, content: Any) -> Iterator[None]:
        """Forward passes inside are over these examples."""
        self._known, self._content = known, content
        self._attempt(self.renew)
        try:
            yield
        finally:
            if self._whole is not None:
                self._tap.record = None
            self._known = self._content = self._whole = None

    def renew(self) -> None:
        """Open the block's record, anew after each step: what follows in the block belongs to the next step."""
        if self._content is None:
            return
        self._tap.record = None
        if not self._wanted():
            return
        if self._whole is None:
            self._whole = self._open(*tensors_of(self._content))
        else:
            record = self._whole.record
            record = self._tap.open(record.rows, record.layout, record.segments)
            self._whole = self._newest = replace(self._whole, record=record, probe=None)
            self._add(self._whole)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._muted or not torch.is_grad_enabled() or self._whole is not None:
            return  # evaluation, generation, a reference model's pass; or the block's record takes it
        if self._wanted() and (module.training or self._known is not None):
            self._attempt(lambda: self._open(args, kwargs))
        else:
            self._tap.record = None

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch | None:
        known = self._known or Known()
        keep = self._texts and known.texts is None
        micro = open_micro_batch(self._tap, args, kwargs, known, self._loss.layout, keep_inputs=keep)
        if micro is None:
            self._tap.record = None
        else:
            micro.known = self._fitting(micro)
            self._newest = micro
            self._add(micro)
        return micro

    def _fitting(self, micro: MicroBatch) -> Known:
        """What is known, without names of the data set's rows that are not the examples of this forward pass."""
        known, given = micro.known, ids_given(micro.known)
        if not known.if_they_fit or given is None or given == micro.record.examples:
            return known
        if not self._misfit:
            self._misfit = True
            logger.warning(
                "the data set names %d rows per batch and the forward pass has %d examples; these are named by their "
                "content", given, micro.record.examples,
            )  # fmt: skip
        return replace(known, ids=None, sources=None)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        micro = self._newest
        if micro is None or self._tap.record is not micro.record or not torch.is_grad_enabled():
            return
        if not self._loss.weighted and (module is self._model or self._whole is not None):
            labels = kwargs["labels"] if "labels" in kwargs else tensors_of(self._content)[1].get("labels")
            self._attempt(lambda: watch_output(micro, labels, output))


def open_micro_batch(
    tap: ModuleTap, args: tuple[Any, ...], kwargs: dict[str, Any], known: Known, layout: Layout, *, keep_inputs: bool
) -> MicroBatch | None:
    """Start recording a forward pass called with these arguments; None if they hold no batch.

    Raises:
        CaptureError: the rows do not divide into examples as the layout says.
    """
    content = batch_content(args, kwargs)
    if content is None:  # a trainer that calls its loss through the model's forward hands over the batch itself
        args, kwargs = tensors_of((args, kwargs))
        content = batch_content(args, kwargs)
    if content is None or content.shape[0] == 0:
        return None
    rows, segments = content.shape[0], None
    mask, labels = _like(content, kwargs.get("attention_mask")), kwargs.get("labels")
    if layout is Layout.SEGMENTS and isinstance(positions := kwargs.get("position_ids"), Tensor):
        segments = Segments.of(positions.expand(rows, -1) if positions.dim() == 2 else positions, ids_given(known))
        labels = None if (by_token := _like(content, labels)) is None else _documents(segments, by_token)
        content, mask = segments.padded(content)
    if rows % layout.sides:
        raise CaptureError(
            f"A forward pass of {rows} rows does not divide into {layout.value}.",
            cause="this trainer does not concatenate the sides of its examples.",
            fix="leave the callback out, or report the trainer.",
        )
    hashes = hash_rows(content, mask, labels if isinstance(labels, Tensor) else None)
    text = keep_inputs and content.dim() == 2 and not content.is_floating_point()
    return MicroBatch(
        record=tap.open(rows, layout, segments),
        known=known,
        hashes=side_hashes(hashes, layout.sides),
        tokens=count_targets(labels),
        inputs=content.detach().clone() if text else None,
        mask=mask.detach().clone() if text and mask is not None else None,
        declared=kwargs.get("num_items_in_batch"),
    )


def _like(content: Tensor, other: Any) -> Tensor | None:
    """The other one, if it has a value for each of the content's."""
    return other if isinstance(other, Tensor) and other.shape == content.shape else None


def _documents(segments: Segments, labels: Tensor) -> Tensor:
    """Labels by document, [N, L]."""
    padded, mask = segments.padded(labels)
    return padded.masked_fill(~mask, IGNORED)


def batch_content(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that identifies the batch's examples: the model's main input."""
    named = [kwargs[name] for name in _CONTENT if isinstance(kwargs.get(name), Tensor)]
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() >= 1]
    return next(iter([*named, *tensors]), None)


def tensors_of(batch: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """A batch as the arguments of a forward pass: its tensors, the largest (no label) first, and by name."""
    found: list[Tensor] = []
    named: dict[str, Any] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            named.update({str(key): inner for key, inner in value.items() if isinstance(inner, Tensor)})
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                collect(inner)

    collect(batch)
    if "prompt_ids" in named and "completion_ids" in named:  # TRL's rollouts, before their two parts are joined
        for whole, part in (("input_ids", "ids"), ("attention_mask", "mask")):
            named[whole] = torch.cat([named[f"prompt_{part}"], named[f"completion_{part}"]], dim=1)
    return tuple(sorted(found, key=Tensor.numel, reverse=True)), named


def watch_output(micro_batch: MicroBatch, labels: Any, output: Any) -> None:
    """Attach the denominator probe to what a forward pass returned, unless an earlier one of the batch has it."""
    if micro_batch.record.layout.sides == 1 and micro_batch.probe is None:
        micro_batch.probe = DenominatorProbe.watch(output, labels)
