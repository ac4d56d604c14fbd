from __future__ import annotations

import hashlib

import pytest
from pydantic import ValidationError

from leyline.digest import Digester, ObjectDigest, digest_bytes, sha256_hex
from leyline.store import CHUNK


def test_a_digest_is_the_sha256_of_each_chunk_and_of_their_list() -> None:
    data = b"a" * CHUNK + b"tail"
    digest = digest_bytes(data)
    chunks = (hashlib.sha256(b"a" * CHUNK), hashlib.sha256(b"tail"))
    assert digest.size == CHUNK + 4
    assert digest.chunks == tuple(chunk.hexdigest() for chunk in chunks)
    assert digest.root == hashlib.sha256(b"".join(chunk.digest() for chunk in chunks)).hexdigest()


def test_pieces_of_any_length_give_the_same_digest() -> None:
    data = bytes(range(256)) * (2 * CHUNK // 256) + b"end"
    for length in (CHUNK, CHUNK - 1, CHUNK + 7, 3 * CHUNK, 1_000_003):
        digester = Digester()
        for at in range(0, len(data), length):
            digester.update(memoryview(data)[at : at + length])
        assert digester.finish() == digest_bytes(data)


@pytest.mark.parametrize(("size", "chunks"), [(0, 0), (1, 1), (CHUNK - 1, 1), (CHUNK, 1), (CHUNK + 1, 2)])
def test_the_number_of_chunks(size: int, chunks: int) -> None:
    assert len(digest_bytes(bytes(size)).chunks) == chunks


def test_it_survives_json() -> None:
    digest = digest_bytes(b"abc")
    assert ObjectDigest.model_validate_json(digest.model_dump_json()) == digest


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 4, "chunks": [], "root": sha256_hex(b"")},
        {"size": CHUNK + 1},
        {"size": -1},
        {"root": "0" * 64},
        {"chunks": ["A" * 64]},
        {"chunks": ["a" * 63]},
        {"comment": "extra"},
    ],
)
def test_a_digest_that_contradicts_itself_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ObjectDigest.model_validate({**digest_bytes(b"abc").model_dump(), **wrong})
