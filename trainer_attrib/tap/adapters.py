"""What PEFT's adapters do to the weights of the bare model, asked of their layers without importing PEFT."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from trainer_attrib.tap.names import is_tuner_layer, parameters_by_name, walk


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight that merging the active adapters would change, one layer copied at a time.

    PEFT's own merge does it, on a copy, so that this holds for each of its methods. Layers whose adapter cannot be
    merged, and quantised ones, whose merged weights would be rounded again, have none.
    """
    for named in walk(model):
        layer = cast(Any, named.module)
        if not is_tuner_layer(layer) or layer.merged or is_tuner_layer(layer.base_layer):
            continue
        before = {name: p for name, p in layer.get_base_layer().named_parameters() if p.is_floating_point()}
        if not before:
            continue
        twin = copy.deepcopy(layer)
        try:
            twin.merge()
        except (NotImplementedError, ValueError):
            continue
        for key, after in twin.get_base_layer().named_parameters():
            if key in before and not before[key].equal(after):
                yield f"{named.name}.{key}", after.detach()


def low_rank_updates(model: nn.Module) -> list[dict[str, Any]]:
    """What LoRA's active adapters add: ``weight += scaling * B @ A``, transposed where the layer stores it so.

    Each entry names the parameters ``weight``, ``A`` [r, in] and ``B`` [out, r] and has ``scaling`` and ``transposed``.
    Layers whose adapter is more than this sum (DoRA, convolutions, other methods) have none.
    """
    names = {id(parameter): name for name, parameter in parameters_by_name(model).items()}
    found = []
    for named in walk(model):
        layer = cast(Any, named.module)
        if not is_tuner_layer(layer) or layer.merged or not hasattr(layer, "lora_A"):
            continue
        weight = getattr(layer.get_base_layer(), "weight", None)
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                sides = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            elif adapter in layer.lora_embedding_A:
                sides = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            else:
                continue
            plain = id(weight) in names and adapter not in layer.lora_variant and sides[0].dim() == sides[1].dim() == 2
            transposed = getattr(layer, "fan_in_fan_out", False) or adapter in layer.lora_embedding_A
            if plain:
                found.append({
                    "weight": names[id(weight)], "A": names[id(sides[0])], "B": names[id(sides[1])],
                    "scaling": float(layer.scaling[adapter]), "transposed": bool(transposed),
                })  # fmt: skip
    return found
