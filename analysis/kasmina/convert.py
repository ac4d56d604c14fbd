"""`python -m kasmina.convert SOURCE TARGET`: a file from before torch 1.6 as safetensors, in a process without means.

The file is read as data, never unpickled. Before its first byte is read the process gives up what it does not need:
memory, more files, children, core dumps.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from kasmina.formats import TensorRef, gather
from kasmina.formats.legacy import read_legacy
from leyline import exits
from leyline.model import Malformed
from leyline.store import CHUNK
from leyline.tensors import ITEMSIZE, framed

_LIMITS = {
    resource.RLIMIT_AS: 2_000_000_000,
    resource.RLIMIT_DATA: 1_000_000_000,
    resource.RLIMIT_NOFILE: 16,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_CORE: 0,
}

_LARGER = 16
"""Times the source that its tensors may take: tied ones become copies, but a value is no terabyte."""


def convert(source: BinaryIO, target: BinaryIO, *, name: str) -> int:
    """Write the weights in `source` as safetensors; how many tensors there are. Tied tensors become copies."""
    if source.read(1) != b"\x80":
        raise Malformed(f"{name} is no file from before torch 1.6; if torch.save wrote it, it is read as it is")
    refs = read_legacy(source, name=name)
    order = sorted(refs, key=lambda tensor: (-refs[tensor].boxes[0].itemsize, tensor))  # keeps every tensor aligned
    target.write(_header(refs, order, source.seek(0, os.SEEK_END), name))

    def read(_: str, start: int, stop: int) -> bytes:
        source.seek(start)
        return source.read(stop - start)

    for tensor in order:
        ref = refs[tensor]
        step = CHUNK // ref.boxes[0].itemsize
        for start in range(0, ref.size, step):
            target.write(gather(ref, start, min(start + step, ref.size), read))
    return len(order)


def _header(refs: Mapping[str, TensorRef], order: Sequence[str], size: int, name: str) -> bytes:
    """`size`: bytes of the source."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, most = 0, _LARGER * size
    for tensor in order:
        ref = refs[tensor]
        if ref.dtype not in ITEMSIZE:
            raise Malformed(f"{name}: {tensor} has dtype {ref.dtype}, which safetensors cannot hold; convert it first")
        offsets = [position, position + ref.nbytes]
        header[tensor] = {"dtype": ref.dtype, "shape": list(ref.shape), "data_offsets": offsets}
        position = offsets[1]
    if position > most:
        raise Malformed(
            f"{name} is {size:,} bytes long, and its tensors {position:,}: they are views of the same few values; save "
            "clones of those that you need"
        )
    return framed(json.dumps(header, separators=(",", ":")).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one file; a refusal is one sentence on stderr, and then there is no target."""
    source, target = map(Path, sys.argv[1:] if argv is None else argv)
    try:
        with source.open("rb") as old, target.open("xb") as new:
            for limit, value in _LIMITS.items():
                hard = resource.getrlimit(limit)[1]
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.setrlimit(limit, (value, value))
            try:
                count = convert(old, new, name=source.name)
                new.flush()
                os.fsync(new.fileno())
            except BaseException:
                target.unlink()
                raise
    except FileExistsError:
        print(f"{target} exists, and nothing is ever replaced; name another target", file=sys.stderr)
        return exits.BAD_INPUT
    except OSError as error:
        print(f"{error.filename or target}: {error.strerror or error}; nothing was written", file=sys.stderr)
        return exits.BAD_INPUT
    except (Malformed, MemoryError) as error:
        print(error if str(error) else "out of memory; the file needs more than 1 GB to be read", file=sys.stderr)
        return exits.BAD_INPUT
    print(count)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
