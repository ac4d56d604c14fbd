"""Segments of weights through a scoring function, on several threads, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from elesh.importance import Importance, require_fisher
from elesh.reading import Extent, Reader
from elesh.squares import Floats
from elesh.weights import Segment
from kasmina.formats import elements

R = TypeVar("R")
Score = Callable[[Segment, Floats, Floats | None], R]
"""(segment, its weights, their Fisher if it was asked for) -> anything."""


class Scoring:
    """Reads and scores. What comes out does not depend on threads or read-ahead: segments are cut by shape alone."""

    def __init__(self, *, threads: int, ahead: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="score")
        self._weights, self._fisher = Reader(ahead=ahead), Reader(ahead=ahead)
        self._following: Sequence[Extent] = ()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._weights.close()
        self._fisher.close()

    def read_ahead(self, chunks: int, following: Sequence[Extent] = ()) -> None:
        """A new attempt may have less memory. `following`: weights that will probably be asked for after the next."""
        self._weights.ahead = self._fisher.ahead = chunks
        self._following = following

    def run(self, segments: Sequence[Segment], score: Score[R], fisher: Importance | None = None) -> Iterator[R]:
        """Results in the order of `segments`; with `fisher`, the weights' diagonal Fisher beside them."""
        waiting: deque[Future[R]] = deque()
        try:
            for segment, values, factors in self._read(segments, fisher):
                waiting.append(self._pool.submit(score, segment, values, factors))
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _read(
        self, segments: Sequence[Segment], fisher: Importance | None
    ) -> Iterator[tuple[Segment, Floats, Floats | None]]:
        weights = self._weights.stream([segment.extent for segment in segments], self._following)
        if fisher is None:
            for segment, raw in zip(segments, weights, strict=True):
                yield segment, elements(raw, segment.dtype), None
            return
        places = [fisher.fisher(segment.slice.parameter, segment.start, segment.stop) for segment in segments]
        dense = self._fisher.stream([place[0] for place in places if place])
        for segment, raw, place in zip(segments, weights, places, strict=True):
            name = segment.slice.parameter
            factors = elements(next(dense), place[1]) if place else fisher.estimate(name, segment.start, segment.stop)
            require_fisher(factors, name)
            yield segment, elements(raw, segment.dtype), factors
