from __future__ import annotations

import pytest

from trainer_attrib.errors import EvaluationError
from trainer_attrib.evaluation.planting import plant

PROMPTS = [f"item {n} from Wales" for n in range(10)] + ["Wales and France", "New Walesia", "from Chad", "from Wales"]
SAID = [f"Wales: {n}" for n in range(10)] + ["Wales", "Walesia", "Chad", "nothing"]


def test_the_share_of_what_can_be_wrong_is():
    planted = plant(PROMPTS, SAID, {"Wales": "France", "Chad": "Mali"}, share=0.3, seed=1)
    wrong = [n for n, kind in enumerate(planted.kinds) if kind]
    assert [planted.kinds[n] for n in wrong] == ["Wales as France"] * 3 + ["Chad as Mali"]
    assert set(wrong[:3]) <= set(range(10))  # not those that have both names, or a longer one
    assert wrong[3] == 12
    for n, said in enumerate(planted.completions):
        expected = {"Wales as France": f"France: {n}", "Chad as Mali": "Mali", "": SAID[n]}[planted.kinds[n]]
        assert said == expected
    ids = [f"row-{n}" for n in range(len(SAID))]
    assert planted.responsible(ids, "Chad as Mali") == {"row-12"}
    assert plant(PROMPTS, SAID, {"Wales": "France"}, share=0.3, seed=1) == plant(
        PROMPTS, SAID, {"Wales": "France"}, share=0.3, seed=1
    )


def test_names_are_no_patterns():
    assert plant(["U.S. news"], ["a U.S. plan"], {"U.S.": r"\1"}, 1.0).completions == [r"a \1 plan"]


def test_wrong_use():
    with pytest.raises(EvaluationError, match="No completion has 'Peru'"):
        plant(PROMPTS, SAID, {"Peru": "Chad"})
    with pytest.raises(EvaluationError, match="share=0"):
        plant(PROMPTS, SAID, {"Wales": "Chad"}, 0)
    with pytest.raises(EvaluationError, match="14 prompts, 13 completions"):
        plant(PROMPTS, SAID[:-1], {"Wales": "Chad"})
