"""Zip archives as torch.save writes them: where each stored file lies, and its checksums. Strict; no data is read.

Refused is what would let two readers see two things, or a few bytes become many: compressed or encrypted entries,
sizes that disagree, entries that overlap, and anything behind the archive's end.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from kasmina.formats.blocks import Bytes
from kasmina.formats.extents import Record
from leyline.model import Malformed

MAX_ENTRIES = 65_536
MAX_DIRECTORY = 16 * 1024 * 1024

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_DESCRIBED = 0x8
"""Flag: checksum and sizes follow the data, and the header before it may have none."""
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_HEADER = 512
"""Bytes that a local header with its name and padding usually fits in."""
_BATCH = 256
"""Headers that are read at a time."""


class _Entry(NamedTuple):
    """What the central directory says of a file. Places are bytes of the object."""

    name: str
    flags: int
    size: int
    header: int
    crc: int
    """Where the directory keeps its checksum."""


def read_records(source: Bytes, begin: int, end: int, *, name: str) -> dict[str, Record]:
    """The files of the archive in bytes [begin, end) of an object, by their names in it. Malformed names the rule."""
    return _Archive(source, begin, end, name).records()


def a_program(name: str) -> Malformed:
    """The refusal of TorchScript, which keeps its code in such an archive too, compressed or not."""
    return Malformed(f"{name} holds a program, no state dict; save that: torch.save(model.state_dict(), path)")


class _Archive:
    def __init__(self, source: Bytes, begin: int, end: int, name: str) -> None:
        self._source, self._begin, self._end, self._name = source, begin, end, name

    def _refused(self, what: str) -> Malformed:
        return Malformed(f"{self._name} is no zip archive as torch.save writes it: {what}; save it again")

    def records(self) -> dict[str, Record]:
        start, stop, count = self._directory()
        entries = sorted(self._entries(start, stop, count), key=lambda entry: entry.header)
        records: dict[str, Record] = {}
        taken = self._begin
        for number, entry in enumerate(entries):
            if number % _BATCH == 0:
                batch = entries[number : number + _BATCH]
                self._source.fetch(
                    (max(each.header - 32, self._begin), min(each.header + _HEADER, self._end)) for each in batch
                )
            if entry.header < taken:
                raise self._refused(f"{entry.name} at byte {entry.header} overlaps what lies before it")
            records[entry.name], taken = self._record(entry, start)
        return records

    def _directory(self) -> tuple[int, int, int]:
        """Where the central directory begins and ends in the object, and how many entries it has."""
        at = self._end - _END.size
        if at < self._begin:
            raise self._refused(f"{self._end - self._begin} bytes are too few for one")
        mark, disk, first, here, count, size, start, comment = _END.unpack(self._source.read(at, self._end))
        if mark != b"PK\5\6" or comment or disk or first or here != count:
            raise self._refused("its last 22 bytes are not the end of one, it is truncated or something follows it")
        locator = at - _LOCATOR.size
        if locator >= self._begin and self._source.read(locator, locator + 4) == b"PK\6\7":
            _, disk, wide, disks = _LOCATOR.unpack(self._source.read(locator, at))
            at = locator - _END64.size
            if disk or disks != 1 or self._begin + wide != at:
                raise self._refused("its zip64 locator points elsewhere")
            mark, rest, _, _, disk, first, here64, count64, size64, start64 = _END64.unpack(
                self._source.read(at, locator)
            )
            short = all(n in (wide, 0xFFFF) for n, wide in ((here, here64), (count, count64)))
            long = all(n in (wide, 0xFFFFFFFF) for n, wide in ((size, size64), (start, start64)))
            if mark != b"PK\6\6" or rest != _END64.size - 12 or disk or first or not (short and long):
                raise self._refused("its zip64 end contradicts its end")
            count, size, start = count64, size64, start64
        if count > MAX_ENTRIES or size > MAX_DIRECTORY:
            raise self._refused(f"{count:,} entries in a directory of {size:,} bytes are more than a checkpoint needs")
        if self._begin + start + size != at:
            raise self._refused("its directory does not end where its end begins")
        return self._begin + start, at, count

    def _entries(self, start: int, stop: int, count: int) -> list[_Entry]:
        data = self._source.read(start, stop)
        found: dict[str, _Entry] = {}
        at = 0
        for _ in range(count):
            if at + _CENTRAL.size > len(data):
                raise self._refused(f"its directory is too short for {count:,} entries")
            fields = _CENTRAL.unpack_from(data, at)
            mark, _, _, flags, method, _, _, _, packed, size, n, m, k, disk, _, _, header = fields
            name = data[at + _CENTRAL.size :][:n].decode("utf-8", "replace")
            if mark != b"PK\1\2" or disk:
                raise self._refused("its directory is damaged")
            if (method or flags & _ENCRYPTED) and "/code/" in name:
                raise a_program(self._name)
            if method or flags & _ENCRYPTED:
                raise self._refused(f"{name} is compressed or encrypted, but tensors are stored as they are")
            extra = data[at + _CENTRAL.size + n :][:m]
            size, packed, header = self._wide(extra, (size, packed, header), name)
            if size != packed:
                raise self._refused(f"{name} is {size:,} bytes long but takes {packed:,}")
            if name in found:
                raise self._refused(f"it holds {name} twice")
            found[name] = _Entry(name, flags, size, self._begin + header, start + at + 16)
            at += _CENTRAL.size + n + m + k
        if at != len(data):
            raise self._refused(f"its directory is longer than its {count:,} entries")
        return list(found.values())

    def _wide(self, extra: bytes, narrow: tuple[int, int, int], name: str) -> list[int]:
        """The values, from the zip64 field where they do not fit into 32 bits."""
        at, wide = 0, b""
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            if kind == 1:
                wide = extra[at + 4 : at + 4 + length]
            at += 4 + length
        values = []
        for value in narrow:
            if value == 0xFFFFFFFF:
                if len(wide) < 8:
                    raise self._refused(f"{name} has no zip64 field where it needs one")
                value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
            values.append(value)
        return values

    def _record(self, entry: _Entry, end: int) -> tuple[Record, int]:
        """Where its data and checksums lie, and the byte behind all of it. `end`: where the directory begins."""
        if entry.header + _LOCAL.size > end:
            raise self._refused(f"{entry.name} begins at byte {entry.header}, behind its files")
        data = self._source.read(entry.header, entry.header + _LOCAL.size)
        mark, _, flags, method, _, _, _, packed, size, n, m = _LOCAL.unpack(data)
        start = entry.header + _LOCAL.size + n + m
        stop = start + entry.size
        if stop > end:
            raise self._refused(f"{entry.name} of {entry.size:,} bytes reaches into its directory")
        name = self._source.read(entry.header + _LOCAL.size, entry.header + _LOCAL.size + n).decode("utf-8", "replace")
        if mark != b"PK\3\4" or method or flags != entry.flags or name != entry.name:
            raise self._refused(f"its directory and the header of {entry.name} disagree")
        described = bool(flags & _DESCRIBED)
        if not {size, packed} <= {entry.size, 0xFFFFFFFF, 0 if described else entry.size}:
            raise self._refused(f"{entry.name} has {size:,} bytes by its header, {entry.size:,} by its directory")
        if not described:
            return Record(start, stop, (entry.header + 14, entry.crc)), stop
        if stop + 16 > end or self._source.read(stop, stop + 4) != b"PK\7\x08":
            raise self._refused(f"no checksum follows {entry.name}")
        return Record(start, stop, (stop + 4, entry.crc)), stop + 16


class Checksums:
    """CRC-32 of records whose object passes by in pieces, from front to back."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._values = dict.fromkeys(records, 0)

    @property
    def ahead(self) -> bool:
        """Whether a checksum stands before its data: it is known only once the object has passed by."""
        return any(at < record.start for record in self._values for at in record.crcs)

    def update(self, chunk: bytes | bytearray, begin: int) -> None:
        """Take the object's bytes from `begin` on."""
        view = memoryview(chunk)
        for record, value in self._values.items():
            piece = view[max(record.start - begin, 0) : max(record.stop - begin, 0)]
            if len(piece):
                self._values[record] = zlib.crc32(piece, value)

    def places(self, begin: int, end: int) -> list[tuple[int, int]]:
        """(byte of the object, what must stand there) for every byte of a checksum in [begin, end)."""
        return [
            (at + number, byte)
            for record, value in self._values.items()
            for at in record.crcs
            if at < end and begin < at + 4
            for number, byte in enumerate(value.to_bytes(4, "little"))
            if begin <= at + number < end
        ]
