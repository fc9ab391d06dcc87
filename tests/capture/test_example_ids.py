"""Content hashes name the example, not the batch, the padding or the position it came with."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_attrib.capture.example_ids import hash_rows, id_strings, side_hashes

PAD = 0
GOLDEN = ["59593ca8c3a7e4a7", "df2101c240f243c6"]
token_lists = st.lists(st.integers(0, 50_000), min_size=1, max_size=12)
batches = st.lists(token_lists, min_size=1, max_size=6)


def _padded(rows: list[list[int]], width: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, where], mask[i, where] = torch.tensor(row), 1
    return tokens, mask


def _labels(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(mask == 0, -100)


@given(batches, st.integers(0, 9), st.booleans())
@settings(deadline=None, max_examples=60)
def test_padding_does_not_matter(rows: list[list[int]], extra: int, labelled: bool) -> None:
    longest = max(map(len, rows))
    found = []
    for width, side in ((longest, "right"), (longest + extra, "right"), (longest + extra, "left")):
        tokens, mask = _padded(rows, width, side)
        found.append(hash_rows(tokens, mask, _labels(tokens, mask) if labelled else None))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@given(batches, st.randoms())
@settings(deadline=None, max_examples=40)
def test_batch_order_and_composition_do_not_matter(rows: list[list[int]], random: object) -> None:
    tokens, mask = _padded(rows, max(map(len, rows)), "right")
    whole = hash_rows(tokens, mask)
    order = random.sample(range(len(rows)), len(rows))
    assert torch.equal(hash_rows(tokens[order], mask[order]), whole[order])
    alone = [hash_rows(*_padded([row], len(row), "right")) for row in rows]
    assert torch.equal(torch.cat(alone), whole)


@given(st.lists(token_lists, min_size=2, max_size=6, unique_by=tuple))
@settings(deadline=None, max_examples=60)
def test_different_examples_differ(rows: list[list[int]]) -> None:
    tokens, mask = _padded(rows, max(map(len, rows)), "right")
    assert len(set(id_strings(hash_rows(tokens, mask)))) == len(rows)


def test_order_length_and_labels_are_part_of_the_content() -> None:
    tokens = torch.tensor([[1, 2, 3], [3, 2, 1], [1, 2, 0], [1, 2, 3]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]])
    assert len(set(id_strings(hash_rows(tokens, mask)))) == 4
    same = torch.tensor([[1, 2, 3], [1, 2, 3]])
    labels = torch.tensor([[1, 2, 3], [1, -100, 3]])
    assert len(set(id_strings(hash_rows(same, None, labels)))) == 2
    assert len(set(id_strings(hash_rows(same, None, torch.tensor([0, 1]))))) == 2
    assert len(set(id_strings(hash_rows(same)))) == 1


def test_inputs_of_any_kind_can_be_hashed() -> None:
    images = torch.randn(4, 3, 5, 5)
    ids = id_strings(hash_rows(images, torch.ones(4, 7)))
    assert len(set(ids)) == 4
    assert ids == id_strings(hash_rows(images.clone()))
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in ids)


def test_pairs_see_both_sides_and_their_order() -> None:
    hashes = hash_rows(torch.tensor([[1], [2], [3], [4]]))
    (first, second) = side_hashes(hashes, 2).tolist()
    assert first != second
    assert side_hashes(hashes[[2, 0]], 2).item() != side_hashes(hashes[[0, 2]], 2).item() == first


def test_ids_are_the_same_in_every_process_and_version() -> None:
    """Pinned: a ledger's hashed ids must be found again in years."""
    assert id_strings(hash_rows(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))) == GOLDEN
