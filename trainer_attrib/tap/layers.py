"""Registry of the layer types whose per-example gradients can be sketched.

A rule turns a layer's input and its output's gradient into projected factors, whose product is the sketch; that is all
the tap needs to know of a layer. docs/extending.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer_attrib.errors import CaptureError


@dataclass(frozen=True)
class Pair:
    """Both projections of one weight, left [K_l, R] and right [K_r, C], bias included.

    ``sides`` are the same without the bias column, contiguous because a slice makes every matrix product slower, and
    ``bias`` [K] is that column (None without a bias). ``diagonals`` [K] are all there is of projections that keep an
    axis as it is, but for a scale; None for others.
    """

    left: Tensor
    right: Tensor
    sides: tuple[Tensor, Tensor]
    bias: Tensor | None
    diagonals: tuple[Tensor | None, Tensor | None] = (None, None)


FactorsOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Gradient of a layer's output -> projected factors [B, S, K_l] and [B, S, K_r]: the sketch is their sum over S."""


class Rule(Protocol):
    """What the tap asks of a layer type."""

    @property
    def bias_axis(self) -> int:
        """Axis of the weight's matrix along which the bias is appended."""
        ...

    def why_not(self, module: nn.Module) -> str:
        """Why an instance cannot be captured, or ``""``."""
        ...

    def watch(self, module: nn.Module, x: Tensor, pair: Pair, bias: Tensor | None) -> FactorsOf:
        """Called after the layer's forward: keep what the backward pass will need, as little as possible."""
        ...


ProjectInput = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
"""(module, input, projection [K, D], projection of the bias column [K] or None) -> projected input [..., K]."""


def _never(module: nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class LayerRule:
    """A layer whose weight's gradient is a sum of products of its input and its output's gradient.

    Args:
        input_axis: axis of ``weight`` that the input meets: 1 for ``Linear`` ([out, in]), 0 for ``Embedding``.
        project_input: projects the input without forming anything larger than [B, S, K].
        refuse: says why an instance cannot be captured, or returns ``""``.
        channels: axis of the output that the other axis of ``weight`` meets, from the end.
    """

    input_axis: int
    project_input: ProjectInput
    refuse: Callable[[nn.Module], str] = _never
    channels: int = -1

    @property
    def bias_axis(self) -> int:
        """The bias is one more input that is always 1."""
        return self.input_axis

    def why_not(self, module: nn.Module) -> str:
        """As the rule's author says."""
        return self.refuse(module)

    def watch(self, module: nn.Module, x: Tensor, pair: Pair, bias: Tensor | None) -> FactorsOf:
        """Project the input now: holding it would defeat checkpointing."""
        of_input, of_output = pair.sides[self.input_axis], pair.sides[1 - self.input_axis]
        scale_of_input, scale_of_output = pair.diagonals[self.input_axis], pair.diagonals[1 - self.input_axis]
        if scale_of_input is not None and self.project_input is _project_dense:
            input_BSK = _three_axes(_scale_dense(x, scale_of_input, bias))
        else:
            input_BSK = _three_axes(self.project_input(module, x, of_input, bias))

        def factors_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
            if self.channels != -1:
                gradient = gradient.movedim(self.channels, -1)
            gradient = gradient.to(of_output.dtype)
            projected = F.linear(gradient, of_output) if scale_of_output is None else gradient * scale_of_output
            output_BSK = _three_axes(projected)
            return (input_BSK, output_BSK) if self.input_axis == 0 else (output_BSK, input_BSK)

        return factors_of


@dataclass(frozen=True)
class ElementwiseRule:
    """A layer that multiplies by its weight [C] (and adds its bias [C]) element by element, such as a norm.

    The weight's matrix is one row, the bias a second one. An example's gradient is small enough to be formed: the sums
    over positions of ``g * xhat`` and of ``g``. The input is held until then, which under gradient checkpointing costs
    the memory that checkpointing saved.

    Args:
        scaled: (module, input) -> xhat, what the weight is multiplied with, [..., C].
        refuse: says why an instance cannot be captured, or returns ``""``.
    """

    scaled: Callable[[nn.Module, Tensor], Tensor]
    refuse: Callable[[nn.Module], str] = _never
    bias_axis: int = 0

    def why_not(self, module: nn.Module) -> str:
        """As the rule's author says, and where the weight is no vector."""
        dimensions = cast(Tensor, module.weight).dim()
        return self.refuse(module) or (f"its weight has {dimensions} dimensions, not 1" if dimensions != 1 else "")

    def watch(self, module: nn.Module, x: Tensor, pair: Pair, bias: Tensor | None) -> FactorsOf:
        """Hold the input; form each example's gradient and project it when the output's gradient is there."""
        left_1K, right_KC = pair.sides[0].T, pair.sides[1]
        scaled_of = self._scaled_now if torch.compiler.is_compiling() else self._scaled_later
        scaled = scaled_of(module, x, right_KC.dtype)

        def factors_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
            gradient = gradient.to(right_KC.dtype)
            rows = [_over_positions(gradient * scaled())]
            sides = [left_1K]
            if bias is not None:
                rows.append(_over_positions(gradient))
                sides.append(bias[None])
            right_BSK = F.linear(torch.stack(rows, 1), right_KC)
            return torch.cat(sides).expand(len(right_BSK), -1, -1), right_BSK

        return factors_of

    def _scaled_later(self, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        version = x._version

        def scaled() -> Tensor:
            if x._version != version:
                raise CaptureError(
                    f"The input of a {type(module).__name__} was changed in place before its backward pass.",
                    fix="leave the layer out (SketchConfig.exclude).",
                )
            return self.scaled(module, x.to(dtype))

        return scaled

    def _scaled_now(self, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Versions cannot be traced. The compiler's partitioner decides whether to keep this or the input."""
        scaled = self.scaled(module, x.to(dtype))
        return lambda: scaled


_RULES: dict[str, Rule] = {}


def register_layer(layer: type | str, rule: Rule) -> None:
    """Teach the tap a layer type, given as a class or as its qualified name (so that nothing needs importing)."""
    _RULES[layer if isinstance(layer, str) else qualified(layer)] = rule


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of the module's type or of its nearest registered base class."""
    return _RULES.get(qualified(_registered(module)))


def known_layers() -> tuple[str, ...]:
    """Qualified names of all registered layer types."""
    return tuple(sorted(_RULES))


def _registered(module: nn.Module) -> type:
    """The module's nearest registered class; ``object`` if there is none."""
    return next(base for base in type(module).__mro__ if qualified(base) in _RULES or base is object)


def qualified(layer: type) -> str:
    """Module and name of a class."""
    return f"{layer.__module__}.{layer.__qualname__}"


def _project_dense(module: nn.Module, x: Tensor, projection_KD: Tensor, bias_K: Tensor | None) -> Tensor:
    return F.linear(x.to(projection_KD.dtype), projection_KD, bias_K)


def _scale_dense(x: Tensor, diagonal_K: Tensor, bias_K: Tensor | None) -> Tensor:
    """The same by a diagonal matrix, whose last row is the bias's where there is one: no matrix product is needed."""
    width = x.shape[-1]
    scaled = x.to(diagonal_K.dtype) * diagonal_K[:width]
    if len(diagonal_K) == width:
        return scaled
    last = scaled.new_zeros(1) if bias_K is None else bias_K[-1:]
    return torch.cat([scaled, last.expand(*scaled.shape[:-1], 1)], -1)


def _project_lookup(module: nn.Module, x: Tensor, projection_KD: Tensor, bias_K: Tensor | None) -> Tensor:
    projected = F.embedding(x, projection_KD.T)
    padding = cast(nn.Embedding, module).padding_idx
    return projected if padding is None else projected.masked_fill((x == padding).unsqueeze(-1), 0.0)


def _refuse_embedding(module: nn.Module) -> str:
    coupled = cast(nn.Embedding, module).scale_grad_by_freq
    return "scale_grad_by_freq couples the examples of a batch" if coupled else ""


def _project_patches(module: nn.Module, x: Tensor, projection_KD: Tensor, bias_K: Tensor | None) -> Tensor:
    """Each row of the projection is a filter: a convolution projects every patch without unfolding the input."""
    convolution = cast(Any, module)
    filters = projection_KD.unflatten(1, convolution.weight.shape[1:])
    projected = convolution._conv_forward(x.to(projection_KD.dtype), filters, bias_K)
    return projected.movedim(1 - convolution.weight.dim(), -1)


def _refuse_convolution(module: nn.Module) -> str:
    groups = cast(nn.Conv2d, module).groups
    return f"groups={groups}: its weight is {groups} matrices, not one" if groups > 1 else refuse_own_forward(module)


def refuse_own_forward(module: nn.Module) -> str:
    """A subclass that computes something else than the class that was registered."""
    base = _registered(module)
    same = type(module).forward is base.forward
    return "" if same else f"{type(module).__name__} has a forward of its own, unlike {base.__name__}"


def _layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    norm = cast(nn.LayerNorm, module)
    return F.layer_norm(x, norm.normalized_shape, None, None, norm.eps)


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    norm = cast(Any, module)
    epsilon = norm.eps if isinstance(norm, nn.RMSNorm) else norm.variance_epsilon
    return F.rms_norm(x, norm.weight.shape, None, epsilon)


def _three_axes(projected: Tensor) -> Tensor:
    """[B, ..., K] with everything between the batch and the projected axis flattened; a missing axis is length 1."""
    return projected.reshape(projected.shape[0], -1, projected.shape[-1])


def _over_positions(gradient: Tensor) -> Tensor:
    """[B, ..., C] -> [B, C]."""
    return gradient if gradient.dim() == 2 else gradient.reshape(gradient.shape[0], -1, gradient.shape[-1]).sum(1)


register_layer(nn.Linear, LayerRule(1, _project_dense))
register_layer("transformers.pytorch_utils.Conv1D", LayerRule(0, _project_dense))
register_layer(nn.Embedding, LayerRule(0, _project_lookup, _refuse_embedding))
for _spatial, _convolution in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
    register_layer(_convolution, LayerRule(1, _project_patches, _refuse_convolution, channels=-1 - _spatial))

LAYER_NORM = ElementwiseRule(_layer_norm, refuse_own_forward)
RMS_NORM = ElementwiseRule(_rms_norm, refuse_own_forward)
_RMS_NORMS = ("llama.modeling_llama.Llama", "mistral.modeling_mistral.Mistral", "qwen2.modeling_qwen2.Qwen2")


def capture_norms() -> None:
    """Teach the tap LayerNorm and RMSNorm, torch's and those of transformers' Llama, Mistral and Qwen2.

    Not done by default: their few parameters cost 1.6 to 2.8 % of a step of the benchmark's GPT-2 (docs/log.md).
    """
    register_layer(nn.LayerNorm, LAYER_NORM)
    register_layer(nn.RMSNorm, RMS_NORM)
    for name in _RMS_NORMS:
        register_layer(f"transformers.models.{name}RMSNorm", RMS_NORM)
