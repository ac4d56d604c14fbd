"""Reading ahead: over the end of a request too, and never at the cost of what is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from elesh.reading import Extent, Reader
from leyline.store import CHUNK, Damaged


class Source:
    """An object of some chunks that knows which of them were read; each holds its number."""

    def __init__(self, chunks: int, *, bad: int | None = None) -> None:
        self.size = chunks * CHUNK
        self.bad = bad
        self.seen: list[int] = []

    def read(self, start: int, stop: int) -> bytes:
        number = start // CHUNK
        self.seen.append(number)
        if number == self.bad:
            raise Damaged(f"chunk {number}")
        return bytes([number]) * (stop - start)


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader(ahead=2)
    yield made
    made.close()


def request(source: Source, first: int, last: int) -> list[Extent]:
    return [Extent(source, first * CHUNK, last * CHUNK)]


def numbers(views: Iterator[memoryview]) -> list[int]:
    return [view[at] for view in views for at in range(0, len(view), CHUNK)]


def test_what_follows_is_read_while_the_end_is_used_and_not_again(reader: Reader) -> None:
    source = Source(8)
    assert numbers(reader.stream(request(source, 0, 2), request(source, 2, 8))) == [0, 1]
    reader._pool.submit(int).result()
    assert set(source.seen) <= {0, 1, 2, 3}, "no more than two chunks ahead"
    assert 2 in source.seen, "the next request finds its first chunk"
    assert numbers(reader.stream(request(source, 2, 8))) == [2, 3, 4, 5, 6, 7]
    assert sorted(source.seen) == list(range(8))


def test_who_comes_instead_gets_what_it_asks_for(reader: Reader) -> None:
    source = Source(8)
    assert numbers(reader.stream(request(source, 0, 2), request(source, 2, 4))) == [0, 1]
    assert numbers(reader.stream(request(source, 5, 7))) == [5, 6]
    assert numbers(reader.stream(request(source, 1, 3))) == [1, 2]


def test_a_bad_chunk_is_the_fault_of_the_request_that_needs_it(reader: Reader) -> None:
    source = Source(4, bad=2)
    assert numbers(reader.stream(request(source, 0, 2), request(source, 2, 4))) == [0, 1]
    with pytest.raises(Damaged, match="chunk 2"):
        numbers(reader.stream(request(source, 2, 4)))
    assert numbers(reader.stream(request(source, 3, 4))) == [3]


def test_without_memory_for_it_nothing_is_read_ahead(reader: Reader) -> None:
    source = Source(4)
    assert numbers(reader.stream(request(source, 0, 2), request(source, 2, 4))) == [0, 1]
    assert len(reader._begun) == 2
    reader.ahead = 0
    assert numbers(reader.stream(request(source, 2, 3), request(source, 3, 4))) == [2]
    assert not reader._begun
