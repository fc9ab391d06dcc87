"""What a row stands for, and what makes rows depend on each other: written into the stage and said before it starts."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer_attrib.types import LossForm


def loss_facts(loss: LossForm, model: nn.Module) -> dict[str, Any]:
    """``layout``, ``unit``, ``coupled_loss`` and ``remarks`` of ``stage.json``."""
    coupled = [*loss.coupled, *couplings(model)]
    return {"layout": loss.layout.value, "unit": loss.unit, "coupled_loss": coupled, "remarks": [*loss.remarks]}


def loss_lines(meta: dict[str, Any]) -> list[str]:
    """The same for people, as far as it is not the ordinary case: independent examples, each of one row."""
    unit = meta.get("unit", LossForm().unit)
    lines = [f"one recorded row is one {unit}"] if unit != LossForm().unit else []
    lines += meta.get("remarks", [])
    return lines + [
        f"coupled loss: {reason}; rows add up to the gradient, but are not what their examples would give alone"
        for reason in meta.get("coupled_loss", [])
    ]


def couplings(model: nn.Module) -> list[str]:
    """Why the model itself makes an example's gradient depend on the others of its batch."""
    reasons = []
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and (m.training or not model.training)]
    if norms:
        reasons.append(f"{len(norms)} BatchNorm layers normalize by the batch's statistics")
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    weight = getattr(text, "router_aux_loss_coef", 0.0)
    if getattr(text, "output_router_logits", False) and weight:
        reasons.append(f"the load-balancing loss of the routers (weight {weight}) is taken over the whole batch")
    return reasons
