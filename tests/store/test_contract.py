"""What every store promises, on a folder and on a real S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier

import pytest

from leyline.digest import Digester, verified_range
from leyline.store import CHUNK, Changed, Damaged, Exists, NotFound, ObjectStore, StoreError


def keys(store: ObjectStore, prefix: str = "", after: str = "") -> list[str]:
    return [head.key for head in store.list(prefix, after=after)]


def big(letter: bytes, tail: bytes = b"tail") -> tuple[list[bytes], int]:
    chunks = [letter * CHUNK, b"2" * CHUNK, tail]
    return chunks, sum(map(len, chunks))


def test_what_was_written_is_read(store: ObjectStore) -> None:
    assert store.put_if_absent("log/0/0.json", b"hello world")
    head = store.head("log/0/0.json")
    assert (head.key, head.size) == ("log/0/0.json", 11)
    assert store.get("log/0/0.json") == b"hello world"
    assert store.get_range("log/0/0.json", 6, 11, pin=head.pin) == b"world"
    assert store.get_range("log/0/0.json", 3, 3) == b""


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    assert store.put_stream("empty", [], size=0)
    assert store.head("empty").size == 0
    assert store.get("empty") == b""


def test_the_same_bytes_again_are_no_error_and_other_bytes_are(store: ObjectStore) -> None:
    assert store.put_if_absent("a", b"one")
    assert not store.put_if_absent("a", b"one")
    for other in (b"two", b"one and more"):
        with pytest.raises(Exists, match="a in "):
            store.put_if_absent("a", other)
    assert store.get("a") == b"one"


def test_of_sixteen_writers_one_wins_each_key(store: ObjectStore) -> None:
    # All keys at once: SeaweedFS lets the losers of one key wait for its lock, a second each.
    together = Barrier(160)

    def write(writer: int, key: str) -> bool:
        together.wait(30)
        try:
            return store.put_if_absent(key, b"%d" % writer)
        except Exists:
            return False

    attempts = [(writer, f"race/{n}") for n in range(10) for writer in range(16)]
    with ThreadPoolExecutor(160) as pool:
        won = list(pool.map(write, *zip(*attempts, strict=True)))
    winners = {key: writer for (writer, key), win in zip(attempts, won, strict=True) if win}
    assert sum(won) == len(winners) == 10
    for key, writer in winners.items():
        assert store.get(key) == b"%d" % writer


def test_a_stream_above_one_chunk(store: ObjectStore) -> None:
    chunks, size = big(b"1")
    assert store.put_stream("big", iter(chunks), size=size)
    head = store.head("big")
    assert head.size == size
    assert store.get_range("big", CHUNK - 2, CHUNK + 2, pin=head.pin) == b"1122"
    assert store.get_range("big", size - 4, size) == b"tail"

    assert not store.put_stream("big", iter(chunks), size=size)
    assert not store.put_stream("big", chunks, size=size), "what can be read again is compared so"
    with pytest.raises(Exists):
        store.put_stream("big", big(b"1", tail=b"tale")[0], size=size)
    assert store.get_range("big", size - 4, size) == b"tail"


def test_a_stream_of_one_chunk_and_of_bytearrays(store: ObjectStore) -> None:
    assert store.put_stream("one", [bytearray(b"x" * CHUNK)], size=CHUNK)
    assert store.put_stream("small", iter([bytearray(b"abc")]), size=3)
    assert store.get("small") == b"abc"
    assert store.head("one").size == CHUNK


def failing() -> Iterator[bytes]:
    yield b"1" * CHUNK
    yield b"2" * CHUNK
    raise OSError("the source broke")


@pytest.mark.parametrize(
    ("source", "size", "error"),
    [
        (failing, 2 * CHUNK + 1, OSError),
        (lambda: iter([b"1" * CHUNK, b"2" * CHUNK]), 2 * CHUNK + 1, StoreError),
        (lambda: iter([b"1" * CHUNK, b"22"]), CHUNK + 1, StoreError),
        (lambda: iter([b"1" * (CHUNK - 1), b"2" * 5]), CHUNK + 4, StoreError),
        (lambda: iter([b"12"]), 3, StoreError),
    ],
    ids=["fails", "too short", "too long", "not cut in chunks", "small and too short"],
)
def test_a_stream_that_fails_leaves_nothing(
    store: ObjectStore, source: Callable[[], Iterator[bytes]], size: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        store.put_stream("big", source(), size=size)
    with pytest.raises(NotFound):
        store.head("big")
    assert keys(store) == []


def test_what_is_not_there(store: ObjectStore) -> None:
    for read in (store.head, store.get, lambda key: store.get_range(key, 0, 1)):
        with pytest.raises(NotFound, match="nothing/here"):
            read("nothing/here")
    assert keys(store, "nothing/") == []
    store.delete("nothing/here")
    store.put_if_absent("file", b"")
    with pytest.raises(NotFound):
        store.head("file/below")


def test_a_range_behind_the_end_is_never_shortened(store: ObjectStore) -> None:
    store.put_if_absent("a", b"12345")
    for start, stop in ((3, 6), (5, 6), (10, 12)):
        with pytest.raises(Changed, match="a"):
            store.get_range("a", start, stop)


def test_an_exchanged_object_is_noticed_by_its_pin(store: ObjectStore) -> None:
    store.put_if_absent("a", b"first")
    pin = store.head("a").pin
    store.delete("a")
    store.put_if_absent("a", b"later")
    with pytest.raises(Changed, match="pinned"):
        store.get_range("a", 0, 5, pin=pin)
    assert store.get_range("a", 0, 5, pin=store.head("a").pin) == b"later"


def test_lists_by_prefix_in_order_and_after(store: ObjectStore) -> None:
    names = [f"log/{n // 4}/{n}.json" for n in range(8)] + ["state/é x%20+", "state/a"]
    for name in names:
        store.put_if_absent(name, name.encode())
    assert keys(store) == sorted(names)
    assert keys(store, "log/1/") == names[4:8]
    assert keys(store, "log/1/6") == ["log/1/6.json"]
    assert keys(store, "log/", after="log/1/5.json") == names[6:8]
    assert keys(store, "", after="log0") == ["state/a", "state/é x%20+"]
    listed = next(store.list("state/a"))
    assert listed == store.head("state/a")


def test_lists_more_than_one_page(store: ObjectStore) -> None:
    names = [f"responses/{n:04d}" for n in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put_if_absent(name, b""), names))
    assert keys(store, "responses/") == names


def test_delete_makes_room(store: ObjectStore) -> None:
    store.put_if_absent("a/b/c", b"1")
    store.delete("a/b/c")
    assert keys(store) == []
    assert store.put_if_absent("a/b/c", b"2")


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../../b", "a/./b", "a\\b", "a\0b", "a\nb"])
def test_a_key_that_could_leave_the_run_is_refused(store: ObjectStore, key: str) -> None:
    for use in (store.head, store.get, store.delete, lambda key: store.put_if_absent(key, b"")):
        with pytest.raises(StoreError, match="no object key"):
            use(key)


def test_the_clock_is_near_and_does_not_litter(store: ObjectStore) -> None:
    store.put_if_absent("a", b"")
    for moment in (store.now(), store.head("a").modified):
        assert moment.tzinfo is UTC
        assert abs(moment - datetime.now(UTC)) < timedelta(seconds=5)
    assert keys(store) == ["a"]


def test_a_verified_range_names_the_damaged_chunk(store: ObjectStore) -> None:
    chunks, size = big(b"1")
    digester = Digester()
    for chunk in chunks:
        digester.update(chunk)
    digest = digester.finish()
    store.put_stream("good", chunks, size=size)
    assert verified_range(store, "good", digest, CHUNK - 1, 2 * CHUNK + 3) == b"1" + b"2" * CHUNK + b"tai"

    store.put_stream("bad", [chunks[0], b"2" * (CHUNK - 1) + b"x", chunks[2]], size=size)
    assert verified_range(store, "bad", digest, 0, CHUNK) == chunks[0]
    with pytest.raises(Damaged, match=r"bad in .*chunk 1 of 3"):
        verified_range(store, "bad", digest, CHUNK - 1, CHUNK + 1)


def test_what_is_borrowed_is_read_where_it_lies_and_never_written_or_deleted(store: ObjectStore) -> None:
    lender = store.lender(f"{store.uri}-lender")
    lender.put_if_absent("deep/model", b"theirs")
    store.borrow(lender.uri, {"checkpoints/a/model": "deep/model"})
    head = store.head("checkpoints/a/model")
    assert (head.key, head.size) == ("checkpoints/a/model", 6)
    assert store.get("checkpoints/a/model") == b"theirs"
    assert store.get_range("checkpoints/a/model", 2, 4, pin=head.pin) == b"ei"
    assert keys(store) == []
    store.delete("checkpoints/a/model")
    assert lender.get("deep/model") == b"theirs"
    with pytest.raises(Changed):
        store.get_range("checkpoints/a/model", 0, 6, pin=f"{head.pin[:-1]}-")
    with pytest.raises(StoreError, match="another kind of store"):
        store.borrow("gs://elsewhere", {})
