"""How far later training pulled a displacement of the weights: what an estimate of it may be wrong about.

Where later stages do nothing to a displacement, taking it out of the final weights is exact (``subtract``). What else
carries it errs in what they did to it, and the more, the more they did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer_attrib.analysis.displacement import Displacement


def pull(carried: Displacement, kept: Displacement) -> float:
    """What later stages did to a displacement, relative to it, in norms over all weights; infinite where that is not
    finite.

    Args:
        carried: the displacement at the end of training, as a method tells it.
        kept: the same had later stages not reacted to it (``subtract``); what one of both does not name is 0.
    """
    none = torch.zeros(())
    changes = {name: carried.get(name, none) - kept.get(name, none) for name in {*carried, *kept}}
    return ratio(norm(changes), norm(kept))


def reach(displacement: Displacement, weights: Mapping[str, Tensor]) -> float:
    """A displacement's norm relative to that of the weights that it moves; infinite where that is not finite."""
    return ratio(norm(displacement), norm({name: weights[name] for name in displacement}))


def norm(named: Mapping[str, Tensor]) -> float:
    """Over all weights together."""
    return math.sqrt(sum(float(part.detach().double().square().sum()) for part in named.values()))


def ratio(part: float, whole: float) -> float:
    """Infinite where it is not finite; 0 of nothing."""
    if part == 0.0:
        return 0.0
    return part / whole if math.isfinite(part) and whole > 0 else math.inf
