"""How much memory an answer takes, roughly, without writing it out."""

from __future__ import annotations


def held_bytes(answer: object) -> float:
    """Bytes of the arrays, tensors, tables, texts and numbers in an answer; infinity where it has something else.

    The same on every process that has the same answer.
    """
    if answer is None or isinstance(answer, (bool, int, float)):
        return 8
    if isinstance(answer, (str, bytes)):
        return len(answer)
    if isinstance(size := getattr(answer, "nbytes", None), int):  # numpy's, torch's and pyarrow's word for it
        return size
    if isinstance(answer, dict):
        return sum(held_bytes(part) for pair in answer.items() for part in pair)
    if isinstance(answer, (list, tuple, set, frozenset)):
        return sum(map(held_bytes, answer))
    if hasattr(answer, "__dict__") and not callable(answer):
        return sum(map(held_bytes, vars(answer).values()))
    return float("inf")
