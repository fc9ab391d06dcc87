"""Registry of the layer types whose per-example gradients can be sketched.

A rule says which axis of ``weight`` the layer's input meets and how that input is projected; the output's gradient
always meets the other axis. That is all the tap needs to know of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

ProjectInput = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
"""(module, input, projection [K, D], projection of the bias column [K] or None) -> projected input [..., K]."""


@dataclass(frozen=True)
class LayerRule:
    """How one layer type's weight gradient factors into its input and its output's gradient.

    Args:
        input_axis: axis of ``weight`` that the input meets: 1 for ``Linear`` ([out, in]), 0 for ``Embedding``.
        project_input: projects the input without forming anything larger than [B, S, K].
        refuse: says why an instance cannot be captured, or returns ``""``.
    """

    input_axis: int
    project_input: ProjectInput
    refuse: Callable[[nn.Module], str] = lambda module: ""


_RULES: dict[str, LayerRule] = {}


def register_layer(layer: type | str, rule: LayerRule) -> None:
    """Teach the tap a layer type, given as a class or as its qualified name (so that nothing needs importing)."""
    _RULES[layer if isinstance(layer, str) else _qualified(layer)] = rule


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of the module's type or of its nearest registered base class."""
    for base in type(module).__mro__:
        rule = _RULES.get(_qualified(base))
        if rule is not None:
            return rule
    return None


def known_layers() -> tuple[str, ...]:
    """Qualified names of all registered layer types."""
    return tuple(sorted(_RULES))


def _qualified(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"


def _project_dense(module: nn.Module, x: Tensor, projection_KD: Tensor, bias_K: Tensor | None) -> Tensor:
    return F.linear(x.to(projection_KD.dtype), projection_KD, bias_K)


def _project_lookup(module: nn.Module, x: Tensor, projection_KD: Tensor, bias_K: Tensor | None) -> Tensor:
    projected = F.embedding(x, projection_KD.T)
    padding = cast(nn.Embedding, module).padding_idx
    return projected if padding is None else projected.masked_fill((x == padding).unsqueeze(-1), 0.0)


def _refuse_embedding(module: nn.Module) -> str:
    coupled = cast(nn.Embedding, module).scale_grad_by_freq
    return "scale_grad_by_freq couples the examples of a batch" if coupled else ""


register_layer(nn.Linear, LayerRule(1, _project_dense))
register_layer("transformers.pytorch_utils.Conv1D", LayerRule(0, _project_dense))
register_layer(nn.Embedding, LayerRule(0, _project_lookup, _refuse_embedding))
