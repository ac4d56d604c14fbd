"""Files that lie. Each is refused by name, quickly, in little memory, and nothing in it is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import builders
import stored

CHILD = """
import json, os, sys, time
from pathlib import Path
from kasmina.formats import read_recognised, recognise
from kasmina.formats.legacy import read_legacy
from leyline.local import LocalStore
from leyline.model import Malformed

def read(folder):
    before = time.process_time()
    try:
        if folder.name.startswith("legacy"):
            with (folder / "x/m.pt").open("rb") as file:
                read_legacy(file, name="m.pt")
        else:
            store = LocalStore(folder)
            read_recognised(store, "x/", recognise(store, "x/"))
    except Malformed as error:
        sentence = str(error)
    else:
        sentence = "ACCEPTED"
    seconds = time.process_time() - before
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    (folder / "answer.json").write_text(json.dumps([sentence, seconds, peak]))

read(Path(sys.argv[1]))
for folder in map(Path, sys.argv[1:]):
    if (child := os.fork()) == 0:  # what one file costs is not what the one before it cost
        read(folder)
        os._exit(0)
    os.waitpid(child, 0)
"""
"""Reads each folder's x/ in a process of its own, and says how it ended, in how many seconds and bytes."""


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


CANARY = "/tmp/canary-of-" + str(os.getpid())

# --- safetensors


def header(document: object, data: bytes = b"", *, length: int | None = None) -> dict[str, bytes]:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return {"model.safetensors": struct.pack("<Q", len(text) if length is None else length) + text + data}


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def deep(text: str) -> bytes:
    """A list in lists, as deep as Python's own reader of JSON goes along with."""
    return (text % ("[" * 900 + "]" * 900)).encode()


SAFETENSORS: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "header longer than the file": (lambda: header({}, length=999), "it is truncated"),
    "header of 2**63 bytes": (lambda: header({}, length=2**63), "is refused"),
    "header of 17 MB": (lambda: header(b"{" + b" " * 17_000_000 + b"}"), "is refused"),
    "deep json": (lambda: header(b"[" * 1_000_000), "not JSON"),
    "header is a list": (lambda: header([]), "not an object"),
    "keys twice": (lambda: header(b'{"a":1,"a":2}'), "unique keys"),
    "overlap": (lambda: header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "overlaps"),
    "hole": (lambda: header({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "hole"),
    "data behind the last tensor": (lambda: header({"a": entry(0, 4, [1])}, bytes(12)), "its header speaks of"),
    "product overflows": (lambda: header({"a": entry(0, 4, [2**33, 2**33])}, bytes(4)), "needs"),
    "240 sides": (lambda: header({"a": entry(0, 4, [2**61] * 240)}, bytes(4)), "at most 64 axes"),
    "500,000 sides": (lambda: header({"a": entry(0, 4, [2**61] * 500_000)}, bytes(4)), "at most 64 axes"),
    "negative side": (lambda: header({"a": entry(0, 4, [-1, -1])}, bytes(4)), "naturals"),
    "side is text": (lambda: header({"a": entry(0, 4, ["1"])}, bytes(4)), "naturals"),
    "unknown dtype": (lambda: header({"a": entry(0, 4, [1], "F128")}, bytes(4)), "known are"),
    "a dtype that is a list": (lambda: header(deep('{"a":{"dtype":%s,"shape":[1],"data_offsets":[0,4]}}')), "no text"),
    "a side that is a list": (
        lambda: header(deep('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}')),
        "of list",
    ),
    "F4 in half bytes": (lambda: header({"a": entry(0, 3, [2, 3], "F4")}, bytes(3)), "rows of 12 bits"),
    "one F4": (lambda: header({"a": entry(0, 1, [], "F4")}, bytes(1)), "rows of 4 bits"),
    "half a surrogate pair": (lambda: header({"a\ud800": entry(0, 4, [1])}, bytes(4)), "no Unicode"),
    "half of one in the metadata": (lambda: header({"__metadata__": {"a": "\udc80"}}), "no Unicode"),
    "empty file": (lambda: {"model.safetensors": b""}, "at least 8"),
    "index leads out": (
        lambda: {
            "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../etc/passwd"}}).encode(),
        },
        "'../../etc/passwd', which does not stand beside it; name each shard",
    ),
    "index to nowhere": (
        lambda: {"model.safetensors.index.json": json.dumps({"weight_map": {"a": ""}}).encode()},
        "names '', which does not stand beside it; name each shard",
    ),
    "index to itself": (
        lambda: {
            "model.safetensors.index.json": json.dumps({"weight_map": {"a": "model.safetensors.index.json"}}).encode()
        },
        "which is no shard of this checkpoint",
    ),
    "index of half a surrogate pair": (
        lambda: {"model.safetensors.index.json": json.dumps({"weight_map": {"a\ud800": "x"}}).encode()},
        "no Unicode",
    ),
    "index without a map": (lambda: {"model.safetensors.index.json": b"{}"}, "no weight_map"),
}

# --- zip


def plain() -> bytes:
    return stored.saved({"a": torch.arange(100.0), "b": torch.ones(3)})


def with_code() -> bytes:
    """As torch.jit.save keeps it."""
    file = io.BytesIO(plain())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/code/__torch__.py", b"pass\n" * 100, compress_type=zipfile.ZIP_DEFLATED)
    return file.getvalue()


def zipped(pickle_: bytes, more: Mapping[str, bytes] | None = None, **how: Any) -> bytes:
    """An archive with this data.pkl, by Python's own writer."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **how) as archive:
        archive.writestr("archive/data.pkl", pickle_)
        for name, data in {"archive/byteorder": b"little", "archive/data/0": bytes(400), **(more or {})}.items():
            archive.writestr(name, data)
    return file.getvalue()


def replaced(data: bytes, old: bytes, new: bytes, *, last: bool = False) -> bytes:
    assert len(old) == len(new) and old in data
    at = data.rindex(old) if last else data.index(old)
    return data[:at] + new + data[at + len(old) :]


def at_end(data: bytes, where: int, value: bytes) -> bytes:
    """Other bytes in the record at the archive's end, `where` bytes into it."""
    start = data.rindex(b"PK\5\6") + where
    return data[:start] + value + data[start + len(value) :]


def at_central(data: bytes, name: bytes, where: int, value: bytes) -> bytes:
    """Other bytes in the directory's entry of this name."""
    start = data.rindex(name) - 46 + where
    return data[:start] + value + data[start + len(value) :]


def saved_pickle() -> bytes:
    return zipfile.ZipFile(io.BytesIO(plain())).read("archive/data.pkl")


def overlapping() -> bytes:
    """The second storage's entry points at the first one's header."""
    data = plain()
    first = struct.unpack("<L", data[data.rindex(b"archive/data/0") - 4 : data.rindex(b"archive/data/0")])[0]
    return at_central(data, b"archive/data/1", 42, struct.pack("<L", first))


def twice() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", saved_pickle())
        archive.writestr("archive/data.pkX", b"\x80\x02}.")
    return file.getvalue().replace(b"data.pkX", b"data.pkl")


def many_entries() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(70_000):
            archive.writestr(f"archive/data/{number}", b"")
    return file.getvalue()


def pt(data: bytes) -> dict[str, bytes]:
    return {"m.pt": data}


ZIPS: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "deflated": (
        lambda: pt(zipped(b"\x80\x02}." + bytes(10**6), compression=zipfile.ZIP_DEFLATED)),
        "compressed or encrypted",
    ),
    "a program's code, compressed": (lambda: pt(with_code()), "m.pt holds a program, no state dict"),
    "encrypted": (lambda: pt(at_central(plain(), b"archive/data.pkl", 8, b"\x09\x08")), "compressed or encrypted"),
    "overlapping entries": (lambda: pt(overlapping()), "overlaps|disagree"),
    "one name twice": (lambda: pt(twice()), "twice"),
    "packed size lies": (lambda: pt(at_central(plain(), b"archive/data/0", 20, b"\x01\0\0\0")), "long but takes"),
    "both sizes lie": (
        lambda: pt(at_central(plain(), b"archive/data/0", 20, struct.pack("<LL", 404, 404))),
        "no checksum follows|overlaps",
    ),
    "size of 4 GB": (
        lambda: pt(at_central(plain(), b"archive/data/0", 20, struct.pack("<LL", 2**32 - 2, 2**32 - 2))),
        "reaches into its directory",
    ),
    "saturated without zip64": (
        lambda: pt(at_central(zipped(saved_pickle()), b"archive/data/0", 20, b"\xff" * 8)),
        "no zip64 field",
    ),
    "zip64 end elsewhere": (
        lambda: pt(replaced(plain(), b"PK\6\7\0\0\0\0", b"PK\6\7\1\0\0\0")),
        "zip64 locator points elsewhere",
    ),
    "zip64 end contradicts": (lambda: pt(at_end(plain(), 12, struct.pack("<L", 7))), "zip64 end contradicts"),
    "header behind the end": (
        lambda: pt(at_central(plain(), b"archive/data/0", 42, struct.pack("<L", 2**31))),
        "behind its files",
    ),
    "truncated": (lambda: pt(plain()[:-5]), "truncated"),
    "something behind it": (lambda: pt(plain() + b"more"), "something follows it"),
    "a comment": (lambda: pt(at_end(plain(), 20, b"\x04\x00") + b"more"), "something follows it|end of one"),
    "only an end": (lambda: pt(b"PK\5\6" + bytes(18)), "nothing that torch.save wrote: it holds 0 data.pkl"),
    "more entries than there are": (
        lambda: pt(at_end(zipped(saved_pickle()), 8, struct.pack("<HH", 9, 9))),
        "too short for 9 entries",
    ),
    "70,000 entries": (lambda: pt(many_entries()), "more than a checkpoint needs"),
    "names differ": (lambda: pt(replaced(plain(), b"archive/data/0", b"archive/data/X")), "disagree"),
    "big endian": (lambda: pt(zipped(saved_pickle(), {"archive/byteorder": b"big"})), "big-endian"),
    "a program": (lambda: pt(zipped(saved_pickle(), {"archive/constants.pkl": b"\x80\x02)."})), "holds a program"),
    "no data.pkl": (lambda: pt(replaced(plain(), b"data.pkl", b"data.pkL")), "disagree"),
    "storage missing": (
        lambda: pt(zipped(saved_pickle(), {"archive/data/9": b""})),
        "storage '1' has no bytes",
    ),
    "storage too short": (
        lambda: pt(zipped(saved_pickle(), {"archive/data/0": bytes(4), "archive/data/1": bytes(12)})),
        "storage '0' has 4 bytes",
    ),
}

# --- pickles, inside an archive


def tensor_pickle(**changed: bytes) -> bytes:
    """What torch writes for one float tensor of 100, with parts of it exchanged."""
    parts = {
        "function": b"ctorch._utils\n_rebuild_tensor_v2\n", "type": b"ctorch\nFloatStorage\n",
        "key": b"X\1\0\0\0" + b"0",
        "numel": b"Kd", "offset": b"K\0", "shape": b"Kd\x85", "strides": b"K\1\x85",
    } | changed  # fmt: skip
    storage = b"(X\7\0\0\0storage" + parts["type"] + parts["key"] + b"X\3\0\0\0cpu" + parts["numel"] + b"tQ"
    rebuilt = parts["function"] + b"(" + storage + parts["offset"] + parts["shape"] + parts["strides"]
    return b"\x80\x02}X\1\0\0\0a" + rebuilt + b"\x89ccollections\nOrderedDict\n)RtRs."


def of(pickle_: bytes) -> Callable[[], dict[str, bytes]]:
    return lambda: pt(zipped(pickle_))


LAUGHS = (
    b"\x80\x02]q\0"
    + b"".join(b"]q" + bytes([n]) + b"(" + (b"h" + bytes([n - 1])) * 10 + b"e" for n in range(1, 60))
    + b"."
)
DEEP = b")" + b"\x85" * 400_000
"""A tuple in tuples. Its hash is a recursion that ends the process."""
DEEP_LIST = b"]" * 300_000 + b"a" * 299_999


def copies(of_them: bytes, count: int) -> bytes:
    """An OrderedDict of 100,000 items or more, and again one of them, and again: 6 bytes each."""
    return b"\x80\x02ccollections\nOrderedDict\nq\0" + of_them + b"q\1]q\2(" + b"h\0h\1\x85R" * count + b"e."


ITEMS = b"}(" + b"".join(b"J" + struct.pack("<i", number) + b"N" for number in range(200_000)) + b"u"
PAIRS = b"](" + b"".join(b"J" + struct.pack("<i", number) + b"N\x86" for number in range(100_000)) + b"e"
LONG_KEY = b"X\1\0\0\0aq\x000(" + b"h\0" * 300_000 + b"tq\1"
LONG_TEXTS = b"X\x40\x42\x0f\0" + b"a" * 1_000_000 + b"q\x000(" + b"h\0" * 3_000 + b"tq\1"
PICKLES: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "os.system": (lambda: pt(zipped(pickle.dumps(Canary(CANARY), protocol=2))), "'posix.system'.*nothing was executed"),
    "os.system, protocol 5": (lambda: pt(zipped(pickle.dumps(Canary(CANARY), protocol=5))), "posix.system"),
    "eval": (of(b"\x80\x02c__builtin__\neval\nX\4\0\0\0exit\x85R."), "__builtin__.eval"),
    "a deeper name": (of(b"\x80\x04\x8c\x05torch\x8c\x0ehub.load_state\x93."), "torch.hub.load_state"),
    "an instance in protocol 0": (of(b"(ios\nsystem\n."), "operation b'i'"),
    "the extension registry": (of(b"\x80\x02\x82\x01."), "operation"),
    "a persistent name as text": (of(b"\x80\x02P0\n."), "operation b'P'"),
    "memo number 2**31": (of(b"\x80\x02Nr\xff\xff\xff\x7f."), "memo number 2,147,483,647"),
    "text of 4 GB": (of(b"\x80\x02X\xff\xff\xff\xff."), "breaks off"),
    "text of 2**63": (of(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f."), "breaks off"),
    "billion laughs": (of(LAUGHS), "values|nested"),
    "inside itself": (of(b"\x80\x02}q\0X\1\0\0\0ah\0s."), "nested more than 64 deep"),
    "400,000 nested tuples": (of(b"\x80\x02" + DEEP + b"."), "nested more than 64 deep"),
    "a deep tuple as a key": (of(b"\x80\x02}" + DEEP + b"Ns."), "contradicts itself"),
    "a long tuple as many keys": (of(b"\x80\x02" + LONG_KEY + b"}h\1Ns" * 3000 + b"."), "contradicts itself"),
    "long texts as a key": (of(b"\x80\x02" + LONG_TEXTS + b"}(h\1Nh\1Nu."), "contradicts itself"),
    "copies of a large dict": (of(copies(ITEMS, 200)), "40,000,000 bytes of memory"),
    "copies of many pairs": (of(copies(PAIRS, 200)), "40,000,000 bytes of memory"),
    "dicts without a copy": (of(b"\x80\x02(" + b"}" * 999_000 + b"t."), "40,000,000 bytes of memory"),
    "marks": (of(b"\x80\x02" + b"(" * 999_000 + b"."), "40,000,000 bytes of memory"),
    "short texts": (of(b"\x80\x02(" + b"\x8c\2\xc4\x81" * 999_000 + b"t."), "40,000,000 bytes of memory"),
    "a text whose characters take four bytes": (
        of(b"\x80\x02X" + struct.pack("<I", 15_000_000) + b"a" * 14_999_996 + b"\xf0\x9f\x98\x80."),
        "40,000,000 bytes of memory",
    ),
    "names": (of(b"\x80\x02(" + b"ctorch\nbool\n" * 400_000 + b"t."), "40,000,000 bytes of memory"),
    "half a surrogate pair": (of(b"\x80\x02}X\4\0\0\0a\xed\xa0\x80Ns."), "text that is no Unicode"),
    "two million operations": (of(b"\x80\x02(" + b"N" * 2_000_000 + b"t."), "more than 1,000,000 operations"),
    "a million dicts": (of(b"\x80\x02(" + b"}\x94" * 1_000_000 + b"t."), "more than 1,000,000 operations"),
    "data.pkl of 17 MB": (of(b"\x80\x02}." + bytes(17_000_000)), "more than 16,777,216 is refused"),
    "breaks off": (of(b"\x80\x02}X"), "breaks off"),
    "pops nothing": (of(b"\x80\x020."), "breaks off"),
    "empty": (of(b""), "breaks off"),
    "a key twice": (of(b"\x80\x02}(X\1\0\0\0aK\1X\1\0\0\0aK\2u."), "twice in one dict"),
    "shape beyond the storage": (of(tensor_pickle(shape=b"M\xff\xff\x85")), "ends at byte"),
    "offset beyond the storage": (of(tensor_pickle(offset=b"Ke")), "ends at byte"),
    "negative stride": (of(tensor_pickle(strides=b"J\xff\xff\xff\xff\x85")), "in a way that torch.save does not"),
    "shape of 2**62": (of(tensor_pickle(shape=b"\x8a\x08" + b"\0" * 7 + b"\x40\x85")), "does not"),
    "product overflows": (
        of(tensor_pickle(shape=b"M\xff\xffM\xff\xff\x86", strides=b"M\xff\xffK\1\x86")),
        "ends at byte",
    ),
    "storage larger than its file": (of(tensor_pickle(numel=b"M\xff\xff")), "a tensor says 262,140"),
    "storage leads out": (of(tensor_pickle(key=b"X\x08\0\0\0../../et")), "has no bytes"),
    "unknown storage": (of(tensor_pickle(type=b"ctorch\nQInt8Storage\n")), "torch.QInt8Storage"),
    "a shape that is a list": (of(tensor_pickle(shape=b"]Kda")), "does not"),
    "two dots are one name": (
        lambda: pt(stored.saved({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}})),
        "two tensors that are called a.b",
    ),
}

# --- distributed checkpoints


def distributed(change: Callable[[Any], None]) -> Callable[[], dict[str, bytes]]:
    """A good one, with its metadata changed."""

    def made() -> dict[str, bytes]:
        weights = {"a": builders.Tensor("F32", (4, 4), bytes(64)), "b": builders.Tensor("F32", (2,), bytes(8))}
        objects = stored.distributed_grid(weights)[1]
        document = pickle.loads(objects[".metadata"])
        change(document)
        return {**objects, ".metadata": pickle.dumps(document)}

    return made


def every_place(**changed: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for info in document.storage_data.values():
            for name, value in changed.items():
                setattr(info, name, value)

    return change


def moved(document: Any) -> None:
    infos = list(document.storage_data.values())
    infos[1].offset, infos[1].relative_path = infos[0].offset + 100, infos[0].relative_path


def other_size(document: Any) -> None:
    document.state_dict_metadata["b"].size = torch.Size([3])


def exchanged(document: Any) -> None:
    """b's place is that of a piece of a."""
    keys = list(document.storage_data)
    document.storage_data[keys[-1]] = document.storage_data.pop(keys[0])
    del document.state_dict_metadata["a"]


def canary(document: Any) -> None:
    document.planner_data = Canary(CANARY)


def piece_twice(document: Any) -> None:
    chunks = document.state_dict_metadata["a"].chunks
    chunks.append(chunks[0])


def nowhere(document: Any) -> None:
    """An empty tensor, and not even one piece of it."""
    document.state_dict_metadata["b"].size = torch.Size([0])
    document.state_dict_metadata["b"].chunks = []


def lost(document: Any) -> None:
    del document.storage_data[next(iter(document.storage_data))]


def made(module: str, name: str, state: bytes) -> bytes:
    """An instance of this class with this state."""
    return f"c{module}\n{name}\n)\x81".encode("latin-1") + state + b"b"


def dict_of(**items: bytes) -> bytes:
    named = (b"X" + struct.pack("<I", len(name)) + name.encode() + value for name, value in items.items())
    return b"}(" + b"".join(named) + b"u"


def written_metadata(described: bytes = b"}", places: bytes = b"}", planned: bytes = b"N") -> dict[str, bytes]:
    """`.metadata` byte by byte: no pickler writes what is in some of these."""
    state = dict_of(state_dict_metadata=described, storage_data=places, planner_data=planned)
    return {".metadata": b"\x80\x02" + made(METADATA, "Metadata", state) + b".", "__0_0.distcp": b"x"}


def place(fqn: bytes, where: bytes = b"X\x0c\0\0\0__0_0.distcp") -> bytes:
    info = dict_of(relative_path=where, offset=b"K\0", length=b"K\1")
    index = made(METADATA, "MetadataIndex", dict_of(fqn=fqn, offset=b")"))
    return b"}(" + index + made("torch.distributed.checkpoint.filesystem", "_StorageInfo", info) + b"u"


def tensor_w(dtype: bytes = b"ctorch\nfloat32\n", chunks: bytes = b"]") -> bytes:
    """One tensor w without axes, as `state_dict_metadata` describes it."""
    properties = made(METADATA, "TensorProperties", b"(" + dtype + b"t")
    return dict_of(w=made(METADATA, "TensorStorageMetadata", dict_of(properties=properties, size=b")", chunks=chunks)))


METADATA = "torch.distributed.checkpoint.metadata"
CHUNK = made(METADATA, "ChunkStorageMetadata", dict_of(offsets=b"N", sizes=b"N"))
W = b"X\1\0\0\0w"


class Attribute:
    def __reduce__(self) -> Any:
        return getattr, ("text", "join")


def planned(keys: bytes) -> Callable[[], dict[str, bytes]]:
    """A tensor in one piece, and the keys that should lead to it."""
    return lambda: written_metadata(tensor_w(chunks=b"]" + CHUNK + b"a"), place(W), dict_of(w=keys))


DCP: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "a path out of the folder": (
        distributed(every_place(relative_path="../../etc/passwd")), "'../../etc/passwd', which does not stand beside"
    ),
    "an absolute path": (distributed(every_place(relative_path="/etc/passwd")), "does not stand beside"),
    "os.system in .metadata": (distributed(canary), "posix.system"),
    "an attribute of no enum": (lambda: {".metadata": pickle.dumps(Attribute())}, "that is no member of an enum"),
    "a piece beyond the object": (distributed(every_place(length=10**9)), "truncated|overlap"),
    "a negative offset": (distributed(every_place(offset=-1)), "no place for the piece"),
    "an offset that is text": (distributed(every_place(offset="0")), "no place for the piece"),
    "pieces overlap": (distributed(moved), "overlap"),
    "pieces do not tile": (distributed(other_size), "do not tile"),
    "a piece twice": (distributed(piece_twice), "do not tile"),
    "a tensor without a piece": (distributed(nowhere), "do not tile"),
    "a piece without a place": (distributed(lost), "no place for the piece"),
    "another tensor's place": (distributed(exchanged), "says F32|something else"),
    "compressed pieces": (distributed(every_place(transform_descriptors=["zstd"])), "stored transformed"),
    "a place of a list": (lambda: written_metadata(b"}", place(b"]")), "a place of something without a name"),
    "a place of a deep tuple": (lambda: written_metadata(b"}", place(DEEP)), "a place of something without a name"),
    "a deep list as a dtype": (lambda: written_metadata(tensor_w(DEEP_LIST)), "w of dtype unknown"),
    "another name as a dtype": (lambda: written_metadata(tensor_w(b"ctorch\nSize\n")), "w of dtype Size"),
    "a deep key of a tensor": (planned(b"(" + DEEP + b"t"), "keys of 'w' that are none"),
    "many keys of a tensor": (planned(LONG_TEXTS), "keys of 'w' that are none"),
    "keys of half a surrogate pair": (planned(b"X\3\0\0\0\xed\xa0\x80\x85"), "text that is no Unicode"),
    "a number as a tensor's name": (lambda: written_metadata(b"}K\1Ns"), "an entry without a name"),
    "one piece many times": (
        lambda: written_metadata(tensor_w(chunks=b"](" + CHUNK + b"q\0" + b"h\0" * 500_000 + b"e"), place(W)),
        "more pieces of w than it has places",
    ),
    "a path of 8 MB": (
        lambda: written_metadata(tensor_w(chunks=b"]" + CHUNK + b"a"), place(W, b"X\0\0\x7a\0" + b"a" * 0x7A0000)),
        "a piece that lies nowhere",
    ),
    ".metadata of 17 MB": (lambda: {".metadata": bytes(17_000_000)}, "is refused"),
    ".metadata that is none": (lambda: {".metadata": b"\x80\x02}."}, "no metadata of torch.distributed.checkpoint"),
}  # fmt: skip

# --- before 1.6


def old(pickle_: bytes | None = None, *, keys: bytes = b"", cut: int = 0) -> dict[str, bytes]:
    """`pickle_` instead of the weights', `keys` instead of the list of storages."""
    data = stored.saved({"a": torch.arange(100.0)}, _use_new_zipfile_serialization=False)
    if keys:
        at = data.rindex(b"\x80\x02]q\0")
        data = data[:at] + b"\x80\x02](" + keys + b"e." + data[data.index(b".", at) + 1 :]
    if pickle_ is not None:
        at = data.index(b"\x80\x02}q\x00X\x01\x00\x00\x00a")
        data = data[:at] + pickle_ + data[data.index(b".", at) + 1 :]
    return pt(data[: len(data) - cut])


LEGACY: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "os.system first": (lambda: pt(pickle.dumps(Canary(CANARY), protocol=2)), "posix.system"),
    "os.system as the weights": (lambda: old(pickle.dumps(Canary(CANARY), protocol=2)), "posix.system"),
    "another pickle": (lambda: pt(pickle.dumps([1, 2], protocol=2)), "torch.save did not write it"),
    "a deep list as a storage's key": (lambda: old(keys=DEEP_LIST), "called by something that is no text"),
    "a deep tuple as a storage's key": (lambda: old(keys=DEEP), "called by something that is no text"),
    "a storage of no tensor": (lambda: old(keys=b"X\1\0\0\0x"), "storage 'x' belongs to no tensor"),
    "truncated storage": (lambda: old(cut=8), "truncated"),
    "truncated pickle": (lambda: old(cut=430), "breaks off"),
}

CASES = {
    **{f"safetensors: {name}": case for name, case in SAFETENSORS.items()},
    **{f"zip: {name}": case for name, case in ZIPS.items()},
    **{f"pickle: {name}": case for name, case in PICKLES.items()},
    **{f"dcp: {name}": case for name, case in DCP.items()},
    **{f"legacy: {name}": case for name, case in LEGACY.items()},
}


Answers = Mapping[str, tuple[str, float, int]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """(sentence, CPU seconds, peak RSS) of each case."""
    root = tmp_path_factory.mktemp("hostile")
    folders = [root / "good", *(root / name.replace("/", "_") for name in CASES)]
    for folder, objects in zip(folders, [pt(plain()), *(make() for make, _ in CASES.values())], strict=True):
        for path, data in objects.items():
            (folder / "x").mkdir(parents=True, exist_ok=True)
            (folder / "x" / path).write_bytes(data)
    subprocess.run([sys.executable, "-c", CHILD, *map(str, folders)], check=True, timeout=250)
    found = [tuple(json.loads((folder / "answer.json").read_text())) for folder in folders]
    assert found[0][0] == "ACCEPTED", "the good one is read"
    return dict(zip(CASES, found[1:], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_by_name_quickly_and_in_little_memory(answers: Answers, name: str) -> None:
    said, seconds, peak = answers[name]
    assert not Path(CANARY).exists(), "something was executed"
    assert said != "ACCEPTED"
    assert re.search(CASES[name][1], said), said
    assert re.search(r"x/|m\.pt|model\.safetensors|\.metadata", said), f"no object is named: {said}"
    assert seconds < 1
    assert peak < 100_000_000


def test_the_corpus_is_large_enough() -> None:
    assert len(CASES) >= 40


def test_the_canary_works(tmp_path: Path) -> None:
    """Unpickled by pickle itself, the file appears: what is asserted above can fail."""
    pickle.loads(pickle.dumps(Canary(str(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()
