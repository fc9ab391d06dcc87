"""Leave-one-out and leave-group-out: do scores order what leaving examples out really does?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer_attrib.evaluation.agreement import Agreement, agreement
from trainer_attrib.evaluation.estimates import finite, same_length


@dataclass(frozen=True)
class LeftOut:
    """Predicted and measured effects of what was left out, and how they agree over the groups, for each query.

    Attributes:
        predicted: float64 [M, Q], sums of scores over what was left out.
        measured: float64 [M, Q], behavior with minus behavior without, mean over seeds.
        noise: float64 [Q], root mean square over groups of the standard error of ``measured``; nan with one seed.
        spearman, pearson: agreement over the M groups. Their ``ceiling`` is what noise leaves room for.
    """

    predicted: np.ndarray
    measured: np.ndarray
    noise: np.ndarray
    spearman: Agreement
    pearson: Agreement

    def __str__(self) -> str:
        size = float(np.sqrt((self.measured**2).mean()))
        noise = "not known" if np.isnan(self.noise).any() else f"{float(np.sqrt((self.noise**2).mean())):.3g}"
        return f"effects {size:.3g} (rms), noise {noise}\n{self.spearman}\n{self.pearson}"


def left_out_agreement(scores: np.ndarray, subsets: np.ndarray, measured: np.ndarray, of_all: np.ndarray) -> LeftOut:
    """Hold the scores of what was left out against its measured effects: behavior with it minus behavior without it.

    A seed's effect is the difference of two models with that seed, so that what a seed does to both cancels.

    Args:
        scores: [Q, N].
        subsets: boolean [M, N], what each model was trained on: :func:`evaluation.subsets.all_but_one` or
            ``all_but_one_group``.
        measured: [M, S, Q], or [M, Q] of one seed.
        of_all: behavior of the models trained on all examples, [S, Q] with the same seeds, or [Q].

    Raises:
        EvaluationError: shapes do not fit, something is not finite, fewer than three subsets, or nothing varies.
    """
    scores_QN = finite("scores", scores, "QN")
    same_length(examples_of_the_scores=scores_QN.shape[1], examples_of_the_subsets=np.shape(subsets)[1])
    without_MSQ = finite("measured", measured[:, None] if np.ndim(measured) == 2 else measured, "MSQ")
    with_SQ = finite("of_all", np.atleast_2d(of_all), "SQ")
    same_length(seeds_of_the_subsets=without_MSQ.shape[1], seeds_of_all_examples=len(with_SQ))
    same_length(queries_of_the_subsets=without_MSQ.shape[2], queries_of_all_examples=with_SQ.shape[1])
    effects_MSQ = with_SQ - without_MSQ
    predicted_MQ = (~np.asarray(subsets, bool)).astype(np.float64) @ scores_QN.T
    seeds = effects_MSQ.shape[1]
    variance_MQ = effects_MSQ.var(1, ddof=1) / seeds if seeds > 1 else np.full(predicted_MQ.shape, np.nan)
    spearman, pearson = (agreement(predicted_MQ, effects_MSQ, kind) for kind in ("spearman", "pearson"))
    return LeftOut(predicted_MQ, effects_MSQ.mean(1), np.sqrt(variance_MQ.mean(0)), spearman, pearson)
