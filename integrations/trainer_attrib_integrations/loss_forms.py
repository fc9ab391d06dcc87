"""How the losses of transformers' and TRL's trainers are made of examples.

Read from the sources of TRL 1.16 and transformers 5.23; docs/trl.md says it for people. Trainers are recognized by
name, so that TRL is not imported here, and their settings are read as the trainers themselves read them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import DataCollatorWithFlattening

from trainer_attrib.types import Layout, LossForm

_TOKEN_MEAN = "its {} term is a mean over the tokens of the whole batch"
_OWN_LOSS = ("compute_loss", "_compute_loss", "get_batch_loss_metrics", "concatenated_forward")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_MASKED_BY_POSITION = re.compile(r"create_\w*mask\w*.*position_ids\"?[=:] ?position_ids", re.DOTALL)


def loss_form(trainer: Any) -> LossForm:
    """The form of a trainer's loss; rows of its forward pass, with a remark, where the trainer is not known."""
    for base in type(trainer).__mro__:
        if not base.__module__.startswith("trl."):
            continue
        form = _FORMS.get(base.__name__)
        if form is None:
            return LossForm(weighted=True, remarks=(_unknown(base),))
        return _with_remark(form(trainer), _changed_by(type(trainer), base))
    if isinstance(getattr(trainer, "data_collator", None), DataCollatorWithFlattening):
        return _flattened(trainer, "document")
    return LossForm()


# ---- the trainers ---------------------------------------------------------------------------------------------------


def _sft(trainer: Any) -> LossForm:
    """Token cross entropy. Padding-free batches are one row, in which attention may keep the documents apart."""
    cut = trainer.args.packing and trainer.args.packing_strategy == "bfd_split"
    if trainer.args.packing and trainer.args.packing_strategy == "wrapped":
        why = "packing='wrapped' cuts documents and lets them see each other: a packed row is one example"
        if not trainer.padding_free:
            return LossForm(unit="packed row", per_token=True, remarks=(why,))
        return _with_remark(_flattened(trainer, "packed row"), why)
    if trainer.padding_free:
        form = _flattened(trainer, "fragment" if cut else "document")
        return _with_remark(form, "packing='bfd_split' cuts long documents: each piece is an example" if cut else "")
    return LossForm(per_token=True)


def _dpo(trainer: Any) -> LossForm:
    coupled = [f"loss_type '{kind}' sorts the batch's log-ratios" for kind in trainer.loss_types if "aot" in kind]
    if "sft" in trainer.loss_types:
        coupled.append(_TOKEN_MEAN.format("sft"))
    return _pairs(*coupled)


def _kto(trainer: Any) -> LossForm:
    kl = "the KL estimate of the batch's mismatched pairs enters every example's loss (as a constant)"
    return LossForm(weighted=True, coupled=(kl,) if trainer.calculate_KL else ())


def _rollouts(trainer: Any) -> LossForm:
    """One completion each. Its advantage is a number when the loss is computed, whatever it was compared with."""
    coupled = ()
    if getattr(trainer, "top_entropy_quantile", 1.0) < 1.0:
        coupled = ("which tokens count is decided by the entropies of the whole batch",)
    return LossForm(unit="rollout", weighted=True, coupled=coupled)


def _cpo(trainer: Any) -> LossForm:
    return _pairs(*[_TOKEN_MEAN.format("likelihood")] * bool(trainer.cpo_alpha))


def _orpo(trainer: Any) -> LossForm:
    return _pairs(_TOKEN_MEAN.format("likelihood"))


def _tpo(trainer: Any) -> LossForm:
    if not trainer.tpo_alpha:
        return _pairs()
    return LossForm(
        layout=Layout.TRIPLES, unit="triple", weighted=True, coupled=(_TOKEN_MEAN.format("reference answer's"),)
    )


def _pairs(*coupled: str) -> LossForm:
    return LossForm(layout=Layout.PAIRS, unit="pair", weighted=True, coupled=coupled)


_FORMS: dict[str, Callable[[Any], LossForm]] = {
    "SFTTrainer": _sft,
    "DPOTrainer": _dpo,
    "RewardTrainer": lambda trainer: _pairs(),
    "KTOTrainer": _kto,
    "GRPOTrainer": _rollouts,
    "RLOOTrainer": _rollouts,
    "GMPOTrainer": _rollouts,
    "DistillationTrainer": _rollouts,
    "CPOTrainer": _cpo,
    "ORPOTrainer": _orpo,
    "TPOTrainer": _tpo,
}


# ---- documents that share a row -------------------------------------------------------------------------------------


def _flattened(trainer: Any, unit: str) -> LossForm:
    """All documents of a micro-batch in one row, each counted by position_ids from its own start."""
    why = why_documents_mix(trainer.model)
    if not why:
        return LossForm(layout=Layout.SEGMENTS, unit=unit, per_token=True)
    remark = f"documents of a micro-batch are in one row and may see each other, so that the row is one example: {why}"
    return LossForm(unit="packed row", per_token=True, remarks=(remark,))


def why_documents_mix(model: nn.Module) -> str:
    """Why documents of one row are not kept apart by their position_ids, or ``""`` where they are.

    Attention of transformers 5 does (``masking_utils.find_packed_sequence_indices`` for eager, sdpa and flex,
    variable-length kernels for flash), if the model hands its positions to the mask. Recurrent and convolutional layers
    carry one document's state into the next.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    attention = str(getattr(text, "_attn_implementation", None))
    if attention not in ("eager", "sdpa", "flex_attention") and "flash" not in attention:
        return f"attention '{attention}' is not known to keep them apart"
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if others:
        return f"layers of type {', '.join(others)} carry one document's state into the next"
    for module in model.modules():
        if getattr(module, "_is_stateful", False) or isinstance(module, nn.Conv1d | nn.RNNBase):
            return f"{type(module).__name__} carries one document's state into the next"
    masking = [m for m in model.modules() if _MASKED_BY_POSITION.search(_source(type(m)))]
    return "" if masking else f"{type(model).__name__} does not mask by position_ids"


def _source(kind: type[nn.Module]) -> str:
    """Source of a model's forward pass; empty for layers and where it is not to be had."""
    if not hasattr(kind, "base_model_prefix"):
        return ""
    try:
        return inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):
        return ""


# ---- remarks --------------------------------------------------------------------------------------------------------


def _unknown(base: type) -> str:
    return (
        f"WARNING: {base.__name__} is not known here; one recorded row is one row of its forward pass, whatever its "
        f"loss makes of it"
    )


def _changed_by(kind: type, known: type) -> str:
    """A remark where the user's own subclass computes its own loss."""
    own = [name for name in _OWN_LOSS for base in kind.__mro__[: kind.__mro__.index(known)] if name in vars(base)]
    if not own:
        return ""
    return f"WARNING: {kind.__name__} has a {own[0]} of its own; rows are made of examples as in {known.__name__}"


def _with_remark(form: LossForm, remark: str) -> LossForm:
    if not remark:
        return form
    return LossForm(**{**vars(form), "remarks": (*form.remarks, remark)})
