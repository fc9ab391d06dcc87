"""Do scores find the bad examples: mislabelled, poisoned, planted?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.correlation import ranks
from trainer_attrib.evaluation.estimates import Estimate, finite, same_length

_DRAWS = 200  # of the bootstrap


@dataclass(frozen=True)
class Detection:
    """How well suspicion tells bad examples from clean ones.

    Attributes:
        auc: probability that a bad example is more suspicious than a clean one, ties counting half. 0.5 is chance.
        average_precision: mean over bad examples of the precision at their place. ``chance`` is what random gives.
        bad, clean: how many of each.
    """

    auc: Estimate
    average_precision: Estimate
    bad: int
    clean: int

    @property
    def chance(self) -> float:
        """Average precision of suspicion that says nothing: the share of bad examples."""
        return self.bad / (self.bad + self.clean)

    def __str__(self) -> str:
        return (
            f"AUC {self.auc}, average precision {self.average_precision} (chance {self.chance:.3f}), "
            f"{self.bad} bad of {self.bad + self.clean}"
        )


def detection(suspicion: np.ndarray, bad: np.ndarray, confusable: np.ndarray | None = None, seed: int = 0) -> Detection:
    """Area under the ROC curve and average precision of finding bad examples.

    Args:
        suspicion: [N], larger where an example is more likely bad. For mislabelled examples this is self-influence: the
            squared norm of an example's own gradient in the method's metric, which is never negative.
        bad: boolean [N].
        confusable: boolean [N]; if given, only these clean examples are counted. Planted answers about a country are
            easy to tell from texts about anything else, and hard to tell from clean texts about the same country.
        seed: of the bootstrap that gives the standard error of the average precision.

    Returns:
        Standard errors are over bad and clean examples: of the AUC by DeLong et al. (1988), of the
        average precision by a bootstrap that draws bad and clean examples apart. Tied examples enter the average
        precision together, at the place of the last of them.

    Raises:
        EvaluationError: lengths differ, a score is not finite, or there are no bad or no clean examples.
    """
    suspicion_N, bad_N = finite("suspicion", suspicion, "N"), np.asarray(bad, bool)
    clean_N = ~bad_N if confusable is None else ~bad_N & np.asarray(confusable, bool)
    same_length(examples_with_suspicion=len(suspicion_N), examples_that_may_be_bad=len(bad_N))
    if not bad_N.any() or not clean_N.any():
        raise EvaluationError(
            f"Found {int(bad_N.sum())} bad and {int(clean_N.sum())} clean examples; both are needed.",
            fix="mark the bad examples, and leave some clean ones that count.",
        )
    high_B, low_C = suspicion_N[bad_N], suspicion_N[clean_N]
    return Detection(_auc(high_B, low_C), _average_precision(high_B, low_C, seed), len(high_B), len(low_C))


def _auc(bad_B: np.ndarray, clean_C: np.ndarray) -> Estimate:
    together = ranks(np.concatenate([bad_B, clean_C]))
    # Share of the clean examples that each bad one beats, and of the bad ones that beat each clean one.
    beats_B = (together[: len(bad_B)] - ranks(bad_B)) / len(clean_C)
    beaten_C = 1 - (together[len(bad_B) :] - ranks(clean_C)) / len(bad_B)
    variance = sum(part.var(ddof=1) / len(part) if len(part) > 1 else np.nan for part in (beats_B, beaten_C))
    return Estimate(float(beats_B.mean()), float(np.sqrt(variance)), len(bad_B) + len(clean_C))


def average_precision(suspicion: np.ndarray, bad: np.ndarray) -> float:
    """Mean over bad examples of the precision at their place; tied examples enter together.

    Args:
        suspicion: [N], larger where an example is more likely bad.
        bad: boolean [N], at least one.
    """
    suspicion_N, bad_N = finite("suspicion", suspicion, "N"), np.asarray(bad, bool)
    order, ends = _ordered(suspicion_N)
    return _precision(bad_N[order], ends, np.ones(len(order)))


def _average_precision(bad_B: np.ndarray, clean_C: np.ndarray, seed: int) -> Estimate:
    order, ends = _ordered(np.concatenate([bad_B, clean_C]))
    is_bad = order < len(bad_B)
    random = np.random.default_rng(seed)

    def drawn() -> np.ndarray:
        return np.concatenate(
            [np.bincount(random.integers(0, n, n), minlength=n) for n in (len(bad_B), len(clean_C))]
        ).astype(np.float64)

    spread = np.std([_precision(is_bad, ends, drawn()[order]) for _ in range(_DRAWS)], ddof=1)
    return Estimate(_precision(is_bad, ends, np.ones(len(order))), float(spread), len(order))


def _ordered(values_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places from the largest value on, and the last of each run of equal values."""
    order = np.argsort(-values_N, kind="stable")
    return order, np.flatnonzero(np.append(np.diff(values_N[order]) != 0, True))


def _precision(is_bad_N: np.ndarray, ends: np.ndarray, weights_N: np.ndarray) -> float:
    """Average precision of ordered examples, each counting as often as its weight says."""
    found, seen = np.cumsum(weights_N * is_bad_N)[ends], np.cumsum(weights_N)[ends]
    return float((np.diff(found, prepend=0.0) * found / np.maximum(seen, 1.0)).sum() / is_bad_N.sum())
