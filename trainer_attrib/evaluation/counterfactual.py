"""The ground truth: behaviors of models that were really trained on parts of the examples, each trained only once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer_attrib.analysis.behavior import Behavior
from trainer_attrib.errors import CorruptPartError, EvaluationError
from trainer_attrib.evaluation.estimates import same_length
from trainer_attrib.execution.choice import runner_of
from trainer_attrib.execution.runner import Runner
from trainer_attrib.ledger.snapshots import load_tensors, save_tensors
from trainer_attrib.ledger.storage import Storage, digest
from trainer_attrib.progress import progress

Train = Callable[[np.ndarray, int], nn.Module]
"""(positions of the examples to train on, ascending; seed) -> the trained model. The same arguments give the same
model: whatever is random in it comes from the seed."""

_MANIFEST, _FORMAT = "retrained.json", 1


class Retrained:
    """Measured behaviors of retrained models, kept in a directory.

    Only what is missing is trained. Every model's values are written, as a whole, before the next one is trained, so
    that an interrupted call goes on where it stopped, and several processes may fill one directory. Weights are not
    kept.

    Args:
        directory: a local path or any fsspec URL.
        behaviors: what is measured; Q is the number of all their queries.
        examples: ids of the N examples that ``train`` counts, which is the order of the masks' columns.
        recipe: what else decides a trained model, in your words: model, optimizer, epochs. Change it when they change.
        train: trains a model; without it only what is there can be read.
        runner: where models are trained: ``"serial"``, ``"torchrun"``, ``"ray"``, or a runner.

    Raises:
        EvaluationError: ids repeat, or the directory holds the values of other examples, behaviors or another recipe.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        behaviors: Sequence[Behavior],
        examples: Sequence[str],
        recipe: str,
        train: Train | None = None,
        runner: str | Runner = "serial",
    ) -> None:
        if len(set(examples)) != len(examples):
            raise EvaluationError(
                f"{len(examples) - len(set(examples))} of the {len(examples)} example ids repeat.",
                cause="equal texts are still two examples.",
                fix="give every example an id of its own, such as its row number.",
            )
        self.behaviors, self.examples, self.recipe = tuple(behaviors), tuple(examples), recipe
        self._train, self._storage, self._runner = train, Storage(directory), runner_of(runner)
        self._runner.once(lambda: self._check(self._facts()))

    @property
    def queries(self) -> int:
        """Q, of all behaviors together."""
        return sum(len(behavior) for behavior in self.behaviors)

    def missing(self, subsets: np.ndarray, seeds: Sequence[int] = (0,)) -> int:
        """How many models :meth:`measure` would train."""
        wanted = {self._file(mask, seed) for mask in self._masks(subsets) for seed in seeds}
        return len(wanted - self._stored())

    def measure(self, subsets: np.ndarray, seeds: Sequence[int] = (0,)) -> np.ndarray:
        """Behaviors of the models trained on these subsets, float64 [M, S, Q]; trains what is missing.

        Args:
            subsets: boolean [M, N].
            seeds: S of them, each given to ``train`` for every subset.

        Raises:
            EvaluationError: something is missing and there is no ``train``, a trained model's behavior is not finite,
                or a file is damaged.
        """
        masks_MN, left = self._masks(subsets), self.missing(subsets, seeds)
        if left and self._train is None:
            raise self._untrained(left)
        wanted = [(self._file(mask_N, seed), mask_N, seed) for mask_N in masks_MN for seed in seeds]
        there = self._stored()
        tasks = [task for task in {task[0]: task for task in wanted}.values() if task[0] not in there]
        for _ in progress(self._runner.map(self._retrain, tasks), "retraining", len(tasks)):
            pass  # every model's values are stored by who trained it
        values = [self._read(name, mask_N) for name, mask_N, _ in wanted]
        return np.array(values).reshape(len(masks_MN), len(seeds), self.queries)

    def of_all(self, seeds: Sequence[int] = (0,)) -> np.ndarray:
        """Behaviors of the models trained on all examples, float64 [S, Q]."""
        return self.measure(np.ones((1, len(self.examples)), bool), seeds)[0]

    def repeat_error(self, subset: np.ndarray, seed: int = 0) -> float:
        """Train one model again: by how much a behavior differs from what is stored, at most. 0 where ``train`` takes
        all that is random from its seed; otherwise effects of single examples drown in this.

        Args:
            subset: boolean [N].
            seed: as given to :meth:`measure`.

        Raises:
            EvaluationError: as of :meth:`measure`.
        """
        stored_Q = self.measure(subset[None], (seed,))[0, 0]
        return float(np.abs(self._values(subset, seed).numpy() - stored_Q).max())

    def _stored(self) -> set[str]:
        """Files of the models that were measured; asked for once, so that all who then train know of the same."""
        return self._runner.once(lambda: {f"values/{name}" for name in self._storage.names("values")})

    def _retrain(self, task: tuple[str, np.ndarray, int]) -> None:
        name, mask_N, seed = task
        values_Q = self._values(mask_N, seed)
        save_tensors(self._storage, name, {"values": values_Q, "subset": torch.from_numpy(mask_N.astype(np.uint8))})

    def _values(self, mask_N: np.ndarray, seed: int) -> torch.Tensor:
        if self._train is None:
            raise self._untrained(1)
        model = self._train(np.flatnonzero(mask_N), seed)
        values_Q = torch.cat([behavior.values(model).detach() for behavior in self.behaviors])
        if not torch.isfinite(values_Q).all():
            raise EvaluationError(
                f"Trained on {int(mask_N.sum())} of {len(mask_N)} examples with seed {seed}, the model has "
                f"{int((~torch.isfinite(values_Q)).sum())} of {len(values_Q)} behaviors that are not finite.",
                cause="the training diverged, or a behavior is a logarithm of zero.",
                fix="train with a lower learning rate; nothing was stored for this model.",
            )
        return values_Q

    def _untrained(self, models: int) -> EvaluationError:
        return EvaluationError(
            f"Models that are missing in {self._storage.url}, which was opened without `train`: {models}.",
            fix="pass the function that trains them, or ask for the subsets and seeds that are there.",
        )

    def _read(self, name: str, mask_N: np.ndarray) -> np.ndarray:
        try:
            found = load_tensors(self._storage, name)
            values_Q, subset_N = found["values"].numpy(), found["subset"].numpy().astype(bool)
            whole = values_Q.shape == (self.queries,) and np.array_equal(subset_N, mask_N)
        except (CorruptPartError, KeyError):
            whole, values_Q = False, np.empty(0)
        if not whole:
            raise EvaluationError(
                f"{self._storage.path(name)} does not hold the {self.queries} values of its subset.",
                cause="the file was damaged or replaced; this library writes it as a whole.",
                fix="delete it: only this model is trained again.",
            )
        return values_Q.astype(np.float64)

    def _masks(self, subsets: np.ndarray) -> np.ndarray:
        masks_MN = np.asarray(subsets)
        if masks_MN.dtype != bool or masks_MN.ndim != 2:
            raise EvaluationError(
                f"Subsets are {masks_MN.dtype} of shape {masks_MN.shape}, expected a boolean mask [M, N].",
                fix="evaluation.subsets makes such masks.",
            )
        same_length(columns_of_the_masks=masks_MN.shape[1], examples=len(self.examples))
        return masks_MN

    def _file(self, mask_N: np.ndarray, seed: int) -> str:
        return f"values/{digest(np.packbits(mask_N).tobytes())}-{seed}.safetensors"

    def _facts(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "examples": {"count": len(self.examples), "ids": _digest(self.examples)},
            "behaviors": [{"name": b.name, "count": len(b), "queries": _digest(b.queries)} for b in self.behaviors],
            "recipe": self.recipe,
        }

    def _check(self, facts: dict[str, Any]) -> None:
        if not self._storage.exists(_MANIFEST):
            self._storage.write_json(_MANIFEST, facts)
            return
        found = self._storage.read_json(_MANIFEST)
        for what, expected in facts.items():
            if found.get(what) != expected:
                raise EvaluationError(
                    f"{self._storage.url} holds retrained models of other {what}: {found.get(what)}, "
                    f"expected {expected}.",
                    cause="the examples, their order, the behaviors or the recipe changed since they were trained.",
                    fix="use another directory, or restore what the models were trained with.",
                )


def _digest(names: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(names).encode(), digest_size=16).hexdigest()
