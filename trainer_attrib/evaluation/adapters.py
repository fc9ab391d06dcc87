"""Our scores in the shapes, orders and signs that other libraries' metrics expect. None of them is imported here.

Our scores are [Q, N], positive where training on the example increased the behavior; measured behaviors are larger
where there is more of the behavior. So use behaviors such as margins and log-probabilities with these metrics: for
``Behavior.loss``, where larger is worse, a library that thinks in "helpful" would read the opposite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer_attrib.analysis.influence_results import Influence
from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.estimates import finite, same_length


def scores_of(influence: Influence, examples: Sequence[str], stage: str | None = None) -> np.ndarray:
    """An influence result's scores in a given order of examples, float64 [Q, N].

    Args:
        influence: what an analyzer answered.
        examples: ids, such as those of :class:`evaluation.counterfactual.Retrained`.
        stage: of which stage; may be left out where every example was scored in one stage.

    Raises:
        EvaluationError: an example has no score, or one in several stages.
    """
    kept = np.arange(len(influence.examples)) if stage is None else np.flatnonzero(influence.examples.stages == stage)
    places = {str(influence.examples.ids[at]): int(at) for at in kept}
    if len(places) < len(kept):
        raise EvaluationError(
            f"{len(kept) - len(places)} examples were scored in several stages.", fix="say of which stage."
        )
    missing = [example for example in examples if example not in places]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(examples)} examples have no score, the first is '{missing[0]}'.",
            cause="they took no part in training, only a sample was recorded, or ids are not those of the recording.",
            fix="evaluate on the examples that have scores, and say how many were left out.",
        )
    return influence.scores[:, [places[example] for example in examples]].astype(np.float64)


def to_quanda(scores: np.ndarray) -> Tensor:
    """``explanations`` of quanda's ``Metric.update``: float32 [Q, N], in the order of its ``train_dataset``, larger =
    more positive influence. The queries are those of one batch, or of all."""
    return torch.from_numpy(finite("scores", scores, "QN")).float()


def to_quanda_datamodeling(
    scores: np.ndarray, subsets: np.ndarray, measured: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What quanda's ``LinearDatamodelingMetric`` needs to use models that were already retrained and measured.

    Args:
        scores: [Q, N].
        subsets: boolean [M, N].
        measured: [M, Q], or [M, S, Q], whose mean over seeds is used.

    Returns:
        Keywords of the metric, beside ``model`` and ``train_dataset``, and of its ``update``, beside ``test_data``,
        which is not looked at.
    """
    values_MQ = _mean_over_seeds(measured)
    same_length(subsets=len(subsets), measured_subsets=len(values_MQ))
    init = {
        "m": len(subsets),
        "subset_ids": [np.flatnonzero(mask).tolist() for mask in subsets],
        "subset_ckpt_filenames": [""] * len(subsets),  # never opened: every subset's values are handed to `update`
    }
    update = {
        "explanations": to_quanda(scores),
        "test_targets": torch.zeros(values_MQ.shape[1], dtype=torch.long),
        "subset_logits": {m: torch.from_numpy(values_Q) for m, values_Q in enumerate(values_MQ)},
    }
    return init, update


def to_dattri(scores: np.ndarray) -> Tensor:
    """``score`` of dattri's metrics: float64 [N, Q], train by test, positive = helpful."""
    return torch.from_numpy(finite("scores", scores, "QN").T.copy())


def to_dattri_lds(
    scores: np.ndarray, subsets: np.ndarray, measured: np.ndarray
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Arguments of ``dattri.metric.lds``: score [N, Q], and values [M, Q] with each subset's positions [M, size].

    Args:
        scores: [Q, N].
        subsets: boolean [M, N], all of one size.
        measured: [M, Q], or [M, S, Q], whose mean over seeds is used.

    Raises:
        EvaluationError: subsets differ in size, which dattri's table of positions cannot hold.
    """
    sizes = np.asarray(subsets, bool).sum(1)
    if len(set(sizes.tolist())) != 1:
        raise EvaluationError(
            f"Subsets have {sizes.min()} to {sizes.max()} examples; dattri's metric needs one size.",
            fix="draw them with evaluation.subsets.random_subsets, or use evaluation.datamodeling.",
        )
    positions_MS = torch.from_numpy(np.stack([np.flatnonzero(mask) for mask in subsets]))
    return to_dattri(scores), (torch.from_numpy(_mean_over_seeds(measured)), positions_MS)


def to_dattri_loo(
    scores: np.ndarray, subsets: np.ndarray, measured: np.ndarray
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Arguments of ``dattri.metric.loo_corr``: score [M, Q] of what was removed, and values [M, Q] with positions [M].

    dattri correlates scores with the values after the removal as they are, which suits values that are losses. A
    behavior falls when what supports it is removed, so its values are handed over with the opposite sign.

    Args:
        scores: [Q, N].
        subsets: boolean [M, N], each without one example.
        measured: [M, Q], or [M, S, Q], whose mean over seeds is used.

    Raises:
        EvaluationError: a subset leaves out more or fewer than one example.
    """
    masks_MN = np.asarray(subsets, bool)
    if not (masks_MN.sum(1) == masks_MN.shape[1] - 1).all():
        raise EvaluationError(
            "A subset leaves out more or fewer than one example.", fix="use evaluation.subsets.all_but_one."
        )
    removed_M = masks_MN.argmin(1)
    values_MQ = torch.from_numpy(-_mean_over_seeds(measured))
    return to_dattri(scores)[removed_M], (values_MQ, torch.from_numpy(removed_M))


def to_dattri_mislabel(suspicion: np.ndarray, bad: np.ndarray) -> tuple[Tensor, Tensor]:
    """Arguments of ``dattri.metric.mislabel_detection_auc``: suspicion [N], larger = more likely bad, and marks [N].

    Its ranking breaks ties by position; :func:`evaluation.detection.detection` counts them half.
    """
    return torch.from_numpy(finite("suspicion", suspicion, "N")), torch.from_numpy(np.asarray(bad, bool))


def _mean_over_seeds(measured: np.ndarray) -> np.ndarray:
    return finite("measured", measured[:, None] if np.ndim(measured) == 2 else measured, "MSQ").mean(1)
