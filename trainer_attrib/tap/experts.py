"""Registry of the modules that multiply each token with the parameters that it is routed to.

Mixture-of-experts modules hold the matrices of all experts in one stack [E, out, in] and see a batch's tokens flattened
and out of order, so that no rule of ``tap.layers`` fits: what happens inside their forward is watched (``tap.routed``).
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from trainer_attrib.tap.layers import qualified

_FAMILIES = {"mixtral": "Mixtral", "olmoe": "Olmoe", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}
_EXPERTS: dict[str, tuple[str, ...]] = {}


def register_experts(layer: type | str, stacks: tuple[str, ...] = ("gate_up_proj", "down_proj")) -> None:
    """Teach the tap a module of experts, given as a class or as its qualified name (so that nothing needs importing).

    Its forward's first tensor must be the tokens, [B * S, H] or [B, S, H]. It gathers those that an expert gets and
    multiplies them with the first stack; between that and the next product of the same experts rows keep their order.

    Args:
        layer: the class.
        stacks: names of its parameters [E, out, in]; a router's is one matrix [E, H].
    """
    _EXPERTS[layer if isinstance(layer, str) else qualified(layer)] = stacks


def capture_experts() -> None:
    """Teach the tap the experts and routers of transformers' Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE.

    Not done by default: every call to torch inside their forward is looked at (docs/log.md has the cost).
    """
    for family, name in _FAMILIES.items():
        module = f"transformers.models.{family}.modeling_{family}.{name}"
        register_experts(f"{module}Experts")
        register_experts(f"{module}TopKRouter", ("weight",))


def stacks_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that a registered module multiplies with; none of any other."""
    return next((stacks for kind in type(module).__mro__ if (stacks := _EXPERTS.get(qualified(kind)))), ())


def stack_name(module: str, key: str) -> str:
    """What a stack is called among the modules of a plan: as if it were one."""
    return f"{module}.{key}" if module else key


def why_not_watched(module: nn.Module) -> str:
    """Why a registered module cannot be captured, or ``""``."""
    experts = cast(Any, module)
    if getattr(experts, "is_transposed", False):
        return "its experts are stored transposed, which is not known yet"
    if getattr(experts, "has_bias", False):
        return "its experts have biases, which are not known yet"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    return ""


def as_stack(projection_KR: Tensor, parameter: Tensor) -> Tensor:
    """The projection of a parameter's rows laid out like it: [E, K, out] for a stack, [K, out] for a matrix."""
    if parameter.dim() == 2:
        return projection_KR
    return projection_KR.unflatten(1, parameter.shape[:2]).transpose(0, 1)
