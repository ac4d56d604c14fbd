"""Reading one pair from the store, digest by digest: the candidate's objects, or else the base's and the masks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from torch import Tensor

from kasmina.enforce import MasksDoNotFit
from kasmina.formats import Box, Chunks, TensorRef, gather, read_index, read_slots, stream
from kasmina.into import Into
from kasmina.tensor_files import read_tensor
from kasmina.training_state import number_of
from leyline import layout
from leyline.candidate import masked_objects
from leyline.digest import sha256_hex, verified_range
from leyline.envelope import Trust
from leyline.evidence import evidence_of
from leyline.fold import PairState
from leyline.log import Log
from leyline.masks import Masks
from leyline.messages import Candidate, CheckpointMetadata, MaskRef
from leyline.model import Malformed
from leyline.ready import read_ready
from leyline.store import Changed, Damaged, NotFound, ObjectStore, StoreError
from leyline.tensors import header_length, parse_header

_DAMAGE = (NotFound, Damaged, Changed)


class PairDamaged(StoreError):
    """The pair cannot be loaded: an object is missing or is not what its digest says, or its masks do not fit."""


def load_pair(store: ObjectStore, log: Log, pair: PairState, into: Into, trust: Trust | None) -> None:
    """Read the pair into `into`, in place: where this raises, what was read before has been taken already.

    PairDamaged after the second time that something is missing or is not what its digest says."""
    ready, manifest = evidence_of(log, pair)
    for attempt in (1, 2):
        try:
            _load(store, pair, into, trust, ready=ready, manifest=manifest)
        except MasksDoNotFit as error:
            raise PairDamaged(f"record {pair.record}, checkpoint {pair.checkpoint}: {error}") from error
        except _DAMAGE as error:
            if attempt == 2:
                raise PairDamaged(f"record {pair.record}, checkpoint {pair.checkpoint}: {error}") from error
        except Malformed:  # the digests are right by now; only once, if something was missing for a moment
            if attempt == 2:
                raise
        else:
            return


def _load(
    store: ObjectStore, pair: PairState, into: Into, trust: Trust | None, *, ready: str | None, manifest: str | None
) -> None:
    key = layout.checkpoint(pair.checkpoint, layout.READY)
    _proven(store, key, ready)
    metadata = read_ready(store, pair.checkpoint, trust=trust)
    masks = read_masks(store, pair.masks) if pair.masks else Masks(model_id=metadata.model_id)
    if pair.candidate is None or not _load_candidate(store, pair.candidate, metadata, into, manifest):
        _load_tensors(store, layout.checkpoint(metadata.name), metadata, into)
    state = None
    if metadata.tracker is not None:
        stored = metadata.object(metadata.tracker)
        path = layout.checkpoint(metadata.name, stored.path)
        state = verified_range(store, path, stored.digest, 0, stored.digest.size)
    into.tracker(state)
    into.masks(masks)


def _load_candidate(
    store: ObjectStore, folder: str, metadata: CheckpointMetadata, into: Into, manifest: str | None
) -> bool:
    """The masked objects that the cycle wrote; False if they are damaged: base and masks give the same bytes."""
    key = f"{folder}MANIFEST.json"
    try:
        candidate = Candidate.parse(_proven(store, key, manifest), name=key)
        objects = metadata.model_copy(update={"objects": candidate.objects})
        _load_tensors(store, folder, objects, into)
    except _DAMAGE:
        return False
    return True


def _load_tensors(store: ObjectStore, prefix: str, metadata: CheckpointMetadata, into: Into) -> None:
    """Weights and slots of one folder, each byte checked against its digest on the way."""
    if not into.wants_slots:
        metadata = metadata.model_copy(update={"optimizer": None})
    # other objects of the checkpoint may be gone: nobody needs them to load
    metadata = metadata.model_copy(update={"objects": masked_objects(metadata)})
    try:
        weights = read_index(store, prefix, metadata)
        slots = read_slots(store, prefix, metadata)
        numbers = _numbers(store, prefix, metadata, slots)
    except Malformed:
        _check_digests(store, prefix, metadata)  # a header is read before its digest is: are the bytes to blame?
        raise
    into.begin(weights, slots)
    for name, value in _tensors(store, prefix, metadata, weights):
        into.weight(name, value)
    for key, value in _tensors(store, prefix, metadata, slots):
        into.slot(key, value, numbers.get(key))


def _tensors(
    store: ObjectStore, prefix: str, metadata: CheckpointMetadata, refs: Mapping[str, TensorRef]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor. What lies in one piece comes in the order of objects and offsets, each object read once."""
    scattered = [(name, ref) for name, ref in refs.items() if not ref.whole]
    whole = [(box, name, ref) for name, ref in refs.items() if (box := ref.whole)]
    whole.sort(key=lambda item: (item[0].object, item[0].offset))
    for path, group in groupby(whole, key=lambda item: item[0].object):
        named: list[tuple[Box, str, TensorRef]] = []
        for item in group:  # what shares bytes with another has passed by when its turn comes
            if named and item[0].offset < named[-1][0].stop:
                scattered.append(item[1:])
            else:
                named.append(item)
        chunks = stream(store, prefix + path, metadata.object(path).digest, pin=named[0][0].pin)
        yield from _assembled(chunks, named)
    digests = {stored.path: stored.digest for stored in metadata.objects}
    kept = Chunks(store, prefix, digests, {box.object: box.pin for _, ref in scattered for box in ref.boxes})
    for name, ref in scattered:
        yield name, read_tensor(bytearray(gather(ref, 0, ref.size, kept.read)), ref.dtype, ref.shape)


def _assembled(chunks: Iterable[bytes], named: Sequence[tuple[Box, str, TensorRef]]) -> Iterator[tuple[str, Tensor]]:
    waiting = deque(named)
    held = bytearray()
    at = 0
    for chunk in chunks:
        view = memoryview(chunk)
        while waiting:
            box, name, ref = waiting[0]
            held += view[max(box.offset + len(held) - at, 0) : box.offset + ref.nbytes - at]
            if len(held) < ref.nbytes:
                break
            yield name, read_tensor(held, ref.dtype, ref.shape)
            held = bytearray()
            waiting.popleft()
        at += len(chunk)


def _numbers(
    store: ObjectStore, prefix: str, metadata: CheckpointMetadata, slots: Mapping[str, TensorRef]
) -> dict[str, str]:
    """Slots that are Python numbers, and which: int or float."""
    if metadata.optimizer is None:
        return {}
    key, size = prefix + metadata.optimizer, metadata.object(metadata.optimizer).digest.size
    length = header_length(store.get_range(key, 0, min(8, size)), size, name=key)
    texts = parse_header(store.get_range(key, 0, length), size, name=key)[1]
    return {slot: number for slot in slots if (number := number_of(slot, texts)) is not None}


def _check_digests(store: ObjectStore, prefix: str, metadata: CheckpointMetadata) -> None:
    for stored in metadata.objects:
        for _ in stream(store, prefix + stored.path, stored.digest):
            pass


def _proven(store: ObjectStore, key: str, digest: str | None) -> bytes:
    """The object, after its digest was compared, where the log has one."""
    data = store.get(key)
    if digest is not None and (found := sha256_hex(data)) != digest:
        raise Damaged(f"{key} in {store.uri} has SHA-256 {found[:12]}, the log says {digest[:12]}")
    return data


def read_masks(store: ObjectStore, ref: MaskRef) -> Masks:
    """The mask file, after its digest was compared. Raises NotFound, Damaged."""
    data = store.get(ref.path)
    if (found := sha256_hex(data)) != ref.digest:
        raise Damaged(f"{ref.path} in {store.uri} has SHA-256 {found[:12]}, the log says {ref.digest[:12]}")
    return Masks.from_bytes(data, name=ref.path)
