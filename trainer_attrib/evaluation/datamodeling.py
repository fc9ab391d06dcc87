"""The linear datamodeling score: do sums of scores order models trained on random parts of the data?"""

from __future__ import annotations

import numpy as np

from trainer_attrib.evaluation.agreement import Agreement, agreement
from trainer_attrib.evaluation.estimates import finite, same_length


def datamodeling_score(scores: np.ndarray, subsets: np.ndarray, measured: np.ndarray) -> Agreement:
    """Linear datamodeling score (Park et al. 2023, "TRAK", definition 2.3), for each query.

    A subset's predicted behavior is the plain sum of the scores of its examples, since a positive score means that
    training on the example increased the behavior. The score is Spearman's correlation of that with the measured
    behavior over the subsets, averaged over queries.

    Args:
        scores: [Q, N].
        subsets: boolean [M, N], what each model was trained on: :func:`evaluation.subsets.random_subsets`.
        measured: [M, S, Q] for S seeds per subset (:meth:`evaluation.counterfactual.Retrained.measure`), or [M, Q].

    Raises:
        EvaluationError: shapes do not fit, something is not finite, fewer than three subsets, or nothing varies.
    """
    scores_QN = finite("scores", scores, "QN")
    same_length(examples_of_the_scores=scores_QN.shape[1], examples_of_the_subsets=np.shape(subsets)[1])
    return agreement(np.asarray(subsets, np.float64) @ scores_QN.T, measured)
