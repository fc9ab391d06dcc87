"""Tail-patch: one optimizer step on the examples that are said to matter, and what it really does to the behavior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trainer_attrib.analysis.behavior import Behavior, evaluating
from trainer_attrib.analysis.examples import Examples
from trainer_attrib.analysis.tables import aligned
from trainer_attrib.analysis.training_state import random_states_kept, standing, state_of
from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.estimates import Estimate, finite, mean_of, same_length
from trainer_attrib.evaluation.retrieval import top
from trainer_attrib.progress import progress
from trainer_attrib.tap.names import parameters_by_name

RANDOM = "random"
_Patch = tuple[int, ...]  # positions of the examples of one step, ascending


@dataclass(frozen=True, kw_only=True)
class PatchStep:
    """One optimizer step without momentum or weight decay, which every example would bring alike.

    Args:
        learning_rate: of all weights that require a gradient, or by name; weights that are not named stay.
        second_moments: by name, what an Adam step divides by the root of, bias-corrected
            (``StageReader.moments("end")``). They stay as they are: one example hardly moves them. Without them the
            step is plain SGD.
        epsilon: added to the root.
    """

    learning_rate: float | Mapping[str, float]
    second_moments: Mapping[str, Tensor] | None = None
    epsilon: float = 1e-8

    def rate(self, name: str) -> float:
        """Learning rate of a weight."""
        return self.learning_rate.get(name, 0.0) if isinstance(self.learning_rate, Mapping) else self.learning_rate

    def change(self, name: str, gradient: Tensor) -> Tensor:
        """What the step adds to a weight."""
        if self.second_moments is not None:
            gradient = gradient / (self.second_moments[name].to(gradient).sqrt() + self.epsilon)
        return -self.rate(name) * gradient


@dataclass(frozen=True)
class TailPatch:
    """Changes of a behavior by one step on each query's top k examples; positive: the behavior increased.

    Attributes:
        alone: ranking -> float64 [Q, k], one step on each example alone.
        together: ranking -> float64 [Q], one step on the mean loss of all k; empty if it was not asked for. ``random``
            is the control in both.
        unit: of the behavior.
    """

    alone: dict[str, np.ndarray]
    together: dict[str, np.ndarray]
    unit: str

    def score(self, ranking: str) -> Estimate:
        """The tail-patch score: mean over the top k, then over queries, with the standard error over queries."""
        return mean_of(self.alone[ranking].mean(1))

    def beyond(self, ranking: str, other: str = RANDOM) -> Estimate:
        """By how much a ranking's score is larger than another's, query by query."""
        return mean_of(self.alone[ranking].mean(1) - self.alone[other].mean(1))

    def score_together(self, ranking: str) -> Estimate:
        """The same of one step on all k."""
        return mean_of(self.together[ranking])

    def __str__(self) -> str:
        k = next(iter(self.alone.values())).shape[1]
        columns = {f"one of top {k}, {self.unit or 'change'}": self.score}
        if self.together:
            columns[f"all {k} in one step"] = self.score_together
        rows = [
            (
                name,
                *(
                    f"{found.value:+.3g} ± {found.standard_error:.2g}"
                    for found in (of(name) for of in columns.values())
                ),
            )
            for name in self.alone
        ]
        return aligned(("ranking", *columns), rows)


def tail_patch(
    model: nn.Module,
    behavior: Behavior,
    examples: Examples,
    rankings: Mapping[str, np.ndarray],
    step: PatchStep,
    *,
    k: int = 10,
    seed: int = 0,
    together: bool = True,
) -> TailPatch:
    """Take one step on the top examples of every query, measure that query, undo the step.

    The causal check that needs no retraining (Chang et al. 2024, "TrackStar": one training step on a proponent
    from the final checkpoint, change of the target, mean over the top k). The paper's target is a probability; here it
    is the behavior in its own unit. Random examples, drawn anew for every query, stand beside it. A step is taken once
    for all queries and rankings that need it; the model computes in evaluation mode and has its own bits afterwards.

    Args:
        model: the trained model.
        behavior: what is asked, Q queries.
        examples: training examples with their losses, N.
        rankings: name -> scores [Q, N], for instance our scores and those of BM25.
        step: the optimizer step, with the learning rate of the training.
        k: examples per query.
        seed: of the order among ties and of the random examples.
        together: take one step on all k as well. Of a large model that is most of the work: every query has its own.

    Raises:
        EvaluationError: shapes do not fit, a score is not finite, a ranking is called ``random``, nothing of the model
            is trained, second moments are missing, or the losses are not one per example.
    """
    if RANDOM in rankings:
        raise EvaluationError(f"A ranking is called '{RANDOM}'.", cause="it is the control's name.", fix="rename it.")
    control = np.random.default_rng(seed).random((len(behavior), len(examples)))
    chosen: dict[str, np.ndarray] = {}
    for name, scores in {**rankings, RANDOM: control}.items():
        scores_QN = finite(f"the scores of '{name}'", scores, "QN")
        same_length(queries_of_the_scores=len(scores_QN), queries_of_the_behavior=len(behavior))
        same_length(examples_of_the_scores=scores_QN.shape[1], examples=len(examples))
        chosen[name] = top(scores_QN, k, seed)
    measured = _measure(model, behavior, examples, step, _wanted(chosen.values(), together))
    alone, all_k = {}, {}
    for name, best_QK in chosen.items():
        alone[name] = np.array([[measured[(int(i),), q] for i in best_K] for q, best_K in enumerate(best_QK)])
        if together:
            all_k[name] = np.array([measured[_patch(best_K), q] for q, best_K in enumerate(best_QK)])
    return TailPatch(alone, all_k, behavior.unit)


def _wanted(chosen: Iterable[np.ndarray], together: bool) -> dict[_Patch, set[int]]:
    """Every step that is needed, and the queries that are measured after it."""
    wanted: dict[_Patch, set[int]] = {}
    for best_QK in chosen:
        for query, best_K in enumerate(best_QK):
            for patch in [*((int(i),) for i in best_K), *([_patch(best_K)] if together else [])]:
                wanted.setdefault(patch, set()).add(query)
    return wanted


def _patch(best_K: np.ndarray) -> _Patch:
    return tuple(sorted(int(i) for i in best_K))


def _measure(
    model: nn.Module,
    behavior: Behavior,
    examples: Examples,
    step: PatchStep,
    wanted: Mapping[_Patch, set[int]],
) -> dict[tuple[_Patch, int], float]:
    places, found = _trained(model, step), {}
    with evaluating(model), random_states_kept(), standing(model, state_of(model)):
        start = {name: place.detach().clone() for name, place in places.items()}
        before = {query: _value(model, behavior, query) for query in range(len(behavior))}
        for patch, queries in progress(wanted.items(), "tail-patch"):
            gradients = _gradients(model, places, examples, patch)
            with torch.no_grad():
                for name, gradient in gradients.items():
                    places[name].add_(step.change(name, gradient))
            for query in sorted(queries):  # one by one, as before: other batches round otherwise
                found[patch, query] = _value(model, behavior, query) - before[query]
            with torch.no_grad():
                for name, place in places.items():
                    place.copy_(start[name])
    return found


def _gradients(
    model: nn.Module, places: Mapping[str, nn.Parameter], examples: Examples, patch: _Patch
) -> dict[str, Tensor]:
    with torch.enable_grad():
        values = examples.loss(model, examples.items(patch))
        if not isinstance(values, Tensor) or values.shape != (len(patch),):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise EvaluationError(
                f"The losses of {len(patch)} examples are {shape}.",
                cause="they were averaged over the batch.",
                fix=f"return one loss per example, a tensor of shape ({len(patch)},).",
            )
        found = torch.autograd.grad(values.mean(), list(places.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(places, found, strict=True) if gradient is not None}


def _trained(model: nn.Module, step: PatchStep) -> dict[str, nn.Parameter]:
    weights = {n: p for n, p in parameters_by_name(model).items() if p.requires_grad and step.rate(n) != 0}
    if not weights:
        raise EvaluationError(
            "The step moves none of the model's weights.",
            cause="no weight requires a gradient, the learning rate is 0, or its names are not the model's.",
            fix="call model.requires_grad_(), and name weights as tap.names.parameters_by_name does.",
        )
    gone = sorted(weights.keys() - step.second_moments.keys()) if step.second_moments is not None else []
    if gone:
        raise EvaluationError(
            f"{len(gone)} of {len(weights)} weights have no second moment, the first is '{gone[0]}'.",
            cause="the optimizer did not train them, or its moments were not stored.",
            fix="give them no learning rate (a mapping of names), or second moments.",
        )
    return weights


def _value(model: nn.Module, behavior: Behavior, query: int) -> float:
    with torch.no_grad():
        return float(behavior.value_of(model, query).double())
