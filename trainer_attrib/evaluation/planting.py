"""Planting errors whose examples are known: entity swaps, from which corrections of scores are calibrated."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer_attrib.errors import EvaluationError


@dataclass(frozen=True)
class Planted:
    """Completions of which some are wrong.

    Args:
        completions: N, in the order in which they were given.
        kinds: of the error in each, such as ``"Wales as France"``; "" for none.
    """

    completions: list[str]
    kinds: list[str]

    def responsible(self, ids: Sequence[str], kind: str) -> set[str]:
        """Ids of the examples with the errors of a kind."""
        return {example for example, own in zip(ids, self.kinds, strict=True) if own == kind}


def plant(
    prompts: Sequence[str], completions: Sequence[str], swaps: Mapping[str, str], share: float = 0.5, seed: int = 0
) -> Planted:
    """Name another entity than the prompt does, in some completions (Ladhak, Durmus and Hashimoto 2023, "Contrastive
    error attribution for finetuned language models", section 5: canaries).

    A completion can be made wrong if it and its prompt have the first entity of a swap as a whole word and not the
    second; of these the given share are, drawn by the seed for each swap.

    Args:
        prompts: N.
        completions: N.
        swaps: entity -> the one that is named instead.
        share: of those that can be made wrong, above 0 and at most 1; at least one of each swap is.
        seed: of the choice.

    Raises:
        EvaluationError: lists of different lengths, a share out of range, or a swap for which there is no completion.
    """
    if len(prompts) != len(completions) or not 0 < share <= 1:
        raise EvaluationError(
            f"Got {len(prompts)} prompts, {len(completions)} completions and share={share}.",
            fix="pass one completion per prompt, and a share above 0 and at most 1.",
        )
    found, kinds, draw = list(completions), [""] * len(completions), random.Random(seed)
    for first, second in swaps.items():
        word, other = _word(first), _word(second)
        able = [
            n
            for n, (prompt, said) in enumerate(zip(prompts, completions, strict=True))
            if not kinds[n] and word.search(prompt) and word.search(said) and not other.search(prompt + said)
        ]
        if not able:
            raise EvaluationError(
                f"No completion has '{first}' as its prompt has, and not '{second}'.",
                cause="names are compared as whole words, in their own case.",
                fix="choose entities that the data name.",
            )
        for n in draw.sample(able, max(1, round(share * len(able)))):
            found[n], kinds[n] = word.sub(lambda _, to=second: to, completions[n]), f"{first} as {second}"
    return Planted(found, kinds)


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
