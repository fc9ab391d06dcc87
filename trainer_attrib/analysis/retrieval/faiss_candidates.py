"""Approximate nearest neighbors propose which examples are worth an exact score."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from trainer_attrib.analysis.retrieval.tally import Tally
from trainer_attrib.errors import ConfigurationError, MissingExtraError
from trainer_attrib.ledger.reader import StageReader

Vectors = Iterable[tuple[int, list[str], np.ndarray]]
"""Second-moment version, examples [N] and vectors [N, K] of a few rows at a time."""


class Faiss:
    """Candidates from an inverted file of rows (Jégou et al. 2011, "Product quantization for nearest neighbor search",
    section IV, without the quantization; `faiss.IndexIVFFlat`). Needs the extra ``faiss``.

    The vectors of all rows are held in memory as float32. The object keeps its indices, so that one that is given to
    several calls is built once, for recipes whose row vectors do not depend on what is asked, as long as the analyzer
    lives. An index is built per second-moment version, over rows: what is proposed are examples with a row close to a
    query.

    Args:
        candidates: rows proposed for each end of every query's ranking. Examples of all queries' proposals are scored.
        probed: share of the lists of the inverted file that are searched, in (0, 1].
        measured: queries whose recall is measured, by an exact scan, when an index is first used for a ``keep``; None:
            all queries of every call.

    Raises:
        ConfigurationError: a number out of range.
    """

    def __init__(self, candidates: int = 1000, probed: float = 0.1, measured: int | None = 8) -> None:
        if candidates < 1 or not 0 < probed <= 1 or (measured is not None and measured < 1):
            raise ConfigurationError(
                f"Faiss got candidates={candidates}, probed={probed}, measured={measured}.",
                fix="pass at least 1 candidate, a share in (0, 1], and at least 1 query or None.",
            )
        self.candidates, self.probed, self.measured = candidates, probed, measured
        self._kept: WeakKeyDictionary[StageReader, dict[Hashable, Index]] = WeakKeyDictionary()

    def check(self, keep: int | None) -> None:
        """Raises:
        ConfigurationError: nothing or more is kept than is proposed.
        MissingExtraError: the extra ``faiss`` is not installed.
        """
        if keep is None or keep > self.candidates:
            raise ConfigurationError(
                f"keep={keep} with {self.candidates} candidates.",
                fix=f"pass keep=k, at most {self.candidates}, or Faiss(candidates=...).",
            )
        _require()

    def index(self, stage: StageReader, key: Hashable, vectors: Callable[[], Vectors]) -> Index:
        """The index of a stage that was kept under this key, or a new one.

        Args:
            stage: whose rows they are.
            key: of the vectors among all of the stage; None: they are of this call only.
            vectors: streams them.

        Raises:
            MissingExtraError: the extra ``faiss`` is not installed.
        """
        kept = self._kept.setdefault(stage, {})
        if key is not None and key in kept:
            return kept[key]
        index = Index(vectors(), self.candidates, self.probed)
        if key is not None:
            kept[key] = index
        return index

    def sample(self, queries: int) -> np.ndarray:
        """Numbers of the queries to measure, evenly spread."""
        count = queries if self.measured is None else min(self.measured, queries)
        return np.unique(np.linspace(0, queries - 1, count).astype(np.int64))


@dataclass
class Index:
    """Inverted files of the rows of every second-moment version.

    Args:
        vectors: of all rows.
        candidates: see :class:`Faiss`.
        probed: see :class:`Faiss`.
    """

    vectors: InitVar[Vectors]
    candidates: int
    probed: float
    said: Tally | None = None  # of the rows in it
    recalls: dict[int, str] = field(default_factory=dict)  # by k

    def __post_init__(self, vectors: Vectors) -> None:
        faiss = _require()
        chunks: dict[int, list[np.ndarray]] = {}
        ids: dict[int, list[str]] = {}
        for version, examples, vectors_NK in vectors:
            chunks.setdefault(version, []).append(vectors_NK)
            ids.setdefault(version, []).extend(examples)
        self._files: dict[int, tuple[Any, np.ndarray]] = {}
        for version in list(chunks):
            vectors_NK = np.concatenate(chunks.pop(version))
            self._files[version] = (self._file(faiss, vectors_NK), np.array(ids[version], dtype=object))

    def propose(self, queries: Callable[[int], Tensor]) -> frozenset[str]:
        """Examples close to any query, or far from it.

        Args:
            queries: second-moment version -> vectors of all queries, [Q, K].
        """
        found: set[str] = set()
        for version, (file, ids) in self._files.items():
            queries_QK = queries(version).float().numpy()
            both = np.ascontiguousarray(np.concatenate([queries_QK, -queries_QK]))
            places = np.unique(file.search(both, min(self.candidates, len(ids)))[1])
            found.update(ids[places[places >= 0]])  # -1 where the searched lists hold fewer
        return frozenset(found)

    def _file(self, faiss: Any, vectors_NK: np.ndarray) -> Any:
        """About as many lists as each has rows; k-means is told by 64 rows per list, the defaults take hours."""
        rows, width = vectors_NK.shape
        lists = max(1, min(int(rows**0.5), rows // 39))  # below 39 rows per list faiss warns
        file = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        file.cp.max_points_per_centroid = 64
        file.train(vectors_NK)
        file.add(vectors_NK)
        file.nprobe = lists if self.candidates >= rows else max(1, round(self.probed * lists))
        return file


def _require() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("faiss", "faiss") from None
    return faiss
