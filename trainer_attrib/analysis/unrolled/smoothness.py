"""Whether a derivative says anything about training: replays with slightly other weights of the examples.

Training that is not smooth has a derivative all the same, exact to the last digit, and it is of no use: across kinks
of a ReLU, or where training amplifies whatever differs, the smallest change of an example leads elsewhere than the
derivative points ("metasmoothness", Engstrom et al. 2025). So it is measured, on changes of the size that matters: all
weights at random, up or down, together by less than leaving out one example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trainer_attrib.analysis.effects.lineage import Lineage
from trainer_attrib.analysis.replaying import replay
from trainer_attrib.analysis.training_state import copy_model, random_states_kept, state_of
from trainer_attrib.analysis.unrolled.trajectory import Trajectory
from trainer_attrib.analysis.unrolled.unroll import StageDerivatives
from trainer_attrib.progress import progress

REACH = 0.3
"""Norm of a change of all weights; leaving out one example has 1. At this size the correlation was closest to that with
real leave-one-out: at 0.1 it was lower with AdamW (0.79 for 0.94), at 1 higher with ReLU (0.76 for 0.52)."""
SMOOTH, SMOOTH_WITH_KINKS = 0.8, 0.95
"""Correlations that are enough. A single query's is too uncertain to acquit a model that is known to have kinks: with
ReLU half of the queries reach 0.85 by chance, one in twelve 0.95."""
_KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish)


@dataclass(frozen=True)
class Smoothness:
    """How well scores predict small changes of training.

    Args:
        stage: whose examples' weights were changed.
        replays: that were run.
        correlation: of what the replays made of the queries with what the scores predict, from -1 to 1.
        kinks: activations of the model with a kink, and how many modules are of each kind.
    """

    stage: str
    replays: int
    correlation: float
    kinks: Mapping[str, int]

    @property
    def enough(self) -> bool:
        """Whether the scores can be trusted."""
        return self.correlation >= (SMOOTH_WITH_KINKS if self.kinks else SMOOTH)

    def __str__(self) -> str:
        told = f"what {self.replays} replays with slightly other weights of all examples came to (correlation "
        if self.enough:
            return f"stage '{self.stage}': these scores predict {told}{self.correlation:.2f})"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinks.items())
        cause = (
            f"the model has kinks ({kinds}), across which no derivative reaches"
            if kinds
            else "training amplifies small changes: long, from scratch, with large steps, or Adam with a small epsilon"
        )
        return (
            f"stage '{self.stage}': training is not smooth enough for these scores to be trusted: they do not predict "
            f"{told}{self.correlation:.2f}, {SMOOTH_WITH_KINKS if kinds else SMOOTH:g} wanted), since {cause}; "
            "leave examples out and retrain, ask recipe='gauss_newton' what they do in general, or train with smooth "
            "activations (GELU, SiLU), smaller steps, and with Adam a larger epsilon"
        )


def smoothness(lineage: Lineage, found: StageDerivatives, replays: int, seed: int) -> Smoothness:
    """Run a stage and all later ones again, each time with other weights of the stage's examples. The model and all
    random states stay as they are.

    Args:
        lineage: with the behaviors, and programs of these stages.
        found: the derivatives that are held against the replays.
        replays: at least 2.
        seed: of the changes.
    """
    shape, draw = (replays, len(found.rows.ids)), np.random.default_rng(seed)
    changes_KN = draw.choice([-1.0, 1.0], shape) * REACH / shape[1] ** 0.5
    title = f"checking {found.stage.name}"
    measured_KQ = np.stack([_queries_with(lineage, found, 1 + change) for change in progress(changes_KN, title)])
    agreed = correlation(changes_KN @ found.scores.T, measured_KQ)
    return Smoothness(found.stage.name, replays, agreed, kinks(lineage.model))


def correlation(predicted_KQ: np.ndarray, measured_KQ: np.ndarray) -> float:
    """Of all values together, each query's taken from its mean and in units of its predictions; 0 where training
    diverged."""
    predicted, measured = (values - values.mean(0) for values in (predicted_KQ, measured_KQ))
    if not np.isfinite(measured).all():
        return 0.0
    units = np.linalg.norm(predicted, axis=0)
    known = units > 0
    if not known.any():
        return float(not measured.any())
    predicted, measured = predicted[:, known] / units[known], measured[:, known] / units[known]
    size = np.linalg.norm(predicted) * np.linalg.norm(measured)
    return float((predicted * measured).sum() / size) if size > 0 else 0.0


def kinks(model: nn.Module) -> dict[str, int]:
    """Activation modules whose derivative jumps: kind -> how many. Functions that are no modules are not found."""
    return dict(Counter(type(module).__name__ for module in model.modules() if isinstance(module, _KINKED)))


def _queries_with(lineage: Lineage, found: StageDerivatives, weights_N: np.ndarray) -> np.ndarray:
    """Values of all queries [Q] after training with these weights of the examples' losses."""
    stage, at, weights = found.stage, found.rows.at, torch.from_numpy(weights_N)

    def weigh(number: int, micro_batch: int) -> Tensor | None:
        rows = at.get((number, micro_batch))
        return None if rows is None else weights[torch.from_numpy(rows)]

    with random_states_kept():
        path = Trajectory(copy_model(lineage.model), stage, lineage.start(stage), lineage.programs)
        path.forward(weigh, keep=False)
        state = state_of(path.model, path.optimizer_state())
    state = replay(lineage.model, state, lineage.later(stage), lineage.programs).state
    return torch.cat(lineage.measure(state)).numpy()
