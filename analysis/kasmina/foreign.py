"""`emrakul import`: a checkpoint that kasmina never saw becomes one of a run, and its objects stay where they are.

What the run gets is small: a topology without groups, READY.json with the digest of every object, and a publish record.
Nothing is known of the model but names, shapes and dtypes, and nothing was measured: its cycles prune single weights by
magnitude, and no masks are committed before somebody publishes an evaluation set.

    python -m kasmina.foreign --from URI --run RUN
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from urllib.parse import unquote

from kasmina.formats import FLOATS, Box, Recognised, TensorRef, read_recognised, recognise
from kasmina.formats.index import INDEX, SAFETENSORS
from kasmina.formats.recognise import TORCH, recognise_object
from leyline import exits, layout
from leyline.digest import Digester, ObjectDigest, digest_bytes, sha256_hex, stored_chunks
from leyline.envelope import (
    SigningKey,
    Trust,
    Untrusted,
    open_envelope,
    signing_keys_from_environment,
    trust_from_environment,
)
from leyline.fold import RunState
from leyline.ids import checkpoint_name, parameter_uuid
from leyline.log import Log, NoRun, NotAllowed
from leyline.messages import CheckpointMetadata, StoredObject
from leyline.model import Malformed
from leyline.open import open_store, probe, run_around
from leyline.ready import PAYLOAD, WRITERS, seal_ready
from leyline.records import Draft, Genesis, Kind, Open, Publish
from leyline.store import ObjectStore, Refused, StoreError, Unreachable, Unsuitable
from leyline.topology import Parameter, Topology

OPEN = "open-import"
"""The id of the open that imports publish under. A run that has another one belongs to a trainer."""

_ENDINGS = re.compile(r"(\.[a-zA-Z]{2,11})+$")
_STEP = re.compile(r"(?:^|[-_/]|step=?)(\d{1,12})$")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint outside of the run."""

    place: ObjectStore
    """The folder that it lies in."""
    checkpoint: Recognised
    step: int
    """That its name ends with; 0 if it does with none."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What `emrakul import` says."""

    uri: str
    record: int
    checkpoint: str
    imported_from: str
    """The folder."""
    weights: str
    """Which of its objects the weights are, or tells where they are."""
    new: bool
    """False: an earlier import made the record."""
    parameters: int
    """Weights in float tensors of two axes and more; of these a cycle may prune."""
    bytes: int


def adopt(
    run: ObjectStore,
    uri: str,
    *,
    step: int | None = None,
    epoch: int = 0,
    model_id: str | None = None,
    exclude: Sequence[str] = (),
    keys: Sequence[SigningKey] = (),
    trust: Trust | None = None,
) -> Imported:
    """Publish the checkpoint at `uri`, a folder or its one file, in `run`, which is made if there is none.

    `step`: by default the number that the name of file or folder ends with, else 0. `model_id`: the run's, or for a new
    run its last part. `exclude`: names of tensors that no cycle may touch, with * and ? as in a shell. The same
    checkpoint again is the same record.

    Malformed, NotAllowed, Untrusted or StoreError say in a sentence what is in the way; nothing is written then.
    """
    found = find(run, uri)
    log = Log(run, keys=keys, trust=trust)
    state = _state(log)
    last = run.uri.rpartition("/")[2]
    model = model_id or (state.model_id if state else last)
    if state is not None and state.model_id != model:
        raise NotAllowed(f"{run.uri} is a run of model {state.model_id}, not {model}; import into a run of its own")
    digests = {path: _digest(found.place, path) for path in found.checkpoint.objects}
    metadata, topology = _described(
        found,
        digests,
        run_id=state.run_id if state else last,
        model_id=model,
        step=found.step if step is None else step,
        epoch=epoch,
        term=state.term if state and state.opened >= 0 else 1,
        exclude=exclude,
    )
    size = sum(digest.size for digest in digests.values())
    said = partial(
        Imported,
        uri=run.uri,
        imported_from=found.place.uri,
        weights=found.checkpoint.objects[0],
        parameters=metadata.num_params,
        bytes=size,
    )
    if state is not None:
        if (known := _known(state, metadata.name)) is not None:
            return said(record=known[0], checkpoint=known[1], new=False)
        _check_imports_only(log, run)
    ready = seal_ready(metadata, keys)
    _check_signed(ready, trust)
    probe(run)
    log.create(Draft(id="genesis", body=Genesis(run_id=metadata.run_id, model_id=model)))
    log.append(Draft(id=OPEN, body=Open()), base=0)
    run.put_if_absent(layout.checkpoint(metadata.name, layout.TOPOLOGY), topology.canonical())
    run.put_if_absent(layout.checkpoint(metadata.name, layout.READY), ready)
    draft = Draft(
        id=metadata.name,
        checkpoint=metadata.name,
        body=Publish(step=metadata.step, epoch=epoch, term=metadata.term, imported_from=found.place.uri),
        evidence={layout.checkpoint(metadata.name, layout.READY): sha256_hex(ready)},
    )
    entry = log.append(draft, base=state.n if state else 0)
    return said(record=entry.record.n, checkpoint=metadata.name, new=True)


def find(run: ObjectStore, uri: str) -> Found:
    """The checkpoint at `uri`, a folder or its one file or index. Malformed if there is none, or more than one."""
    place, name = _place(run, uri)
    here = run.lender(run.uri).uri  # as the place is written: without symbolic links
    # beside one named file there is room for a run; what is named as a folder is the checkpoint's alone
    if here == place.uri or (not name and here.startswith(f"{place.uri}/")):
        raise StoreError(f"the run {here} would lie in the checkpoint's own folder {place.uri}; give it another place")
    if (owner := run_around(place)) is not None:
        raise StoreError(
            f"{uri} lies in the run {owner}, whose gc deletes what that run needs no longer; copy it out of there"
        )
    checkpoint = recognise_object(place, name) if name else recognise(place, "")
    numbers = (_STEP.search(_ENDINGS.sub("", one)) for one in (checkpoint.objects[0], unquote(place.uri)))
    return Found(place=place, checkpoint=checkpoint, step=next((int(found[1]) for found in numbers if found), 0))


def _place(run: ObjectStore, uri: str) -> tuple[ObjectStore, str]:
    """The folder at `uri`, or the folder of the one file there and that file's name.

    Names tell little: what torch.save wrote may be called `x.pth.tar`, and what Lightning shards is a folder `x.ckpt`.
    """
    name = uri.rpartition("/")[2]
    folder = uri.removesuffix(name) or "."
    if name and (_stands(run, folder, name) or (uri.endswith((SAFETENSORS, INDEX, *TORCH)) and _is_empty(run, uri))):
        return run.lender(folder), name
    return run.lender(uri), ""


def _stands(run: ObjectStore, folder: str, name: str) -> bool:
    try:
        run.lender(folder).head(name)
    except StoreError:  # a folder, or what its own error will tell of
        return False
    return True


def _is_empty(run: ObjectStore, uri: str) -> bool:
    return next(run.lender(uri).list(""), None) is None


def _digest(place: ObjectStore, path: str) -> ObjectDigest:
    digester = Digester()
    for chunk in stored_chunks(place, path):
        digester.update(chunk)
    return digester.finish()


def _described(
    found: Found,
    digests: Mapping[str, ObjectDigest],
    *,
    run_id: str,
    model_id: str,
    step: int,
    epoch: int,
    term: int,
    exclude: Sequence[str],
) -> tuple[CheckpointMetadata, Topology]:
    """READY.json and the topology: every float tensor of two axes and more is a parameter, and no structure is known.

    What has one axis stays out: it may be a bias, a norm, or a running statistic, and only the model knows which.
    """
    said = hashlib.sha256("\0".join((found.place.uri, str(epoch))).encode())
    for path in found.checkpoint.objects:
        said.update(f"\0{path}\0{digests[path].root}".encode())
    for pattern in exclude:
        said.update(f"\0-{pattern}".encode())
    name = checkpoint_name(step, term, said.hexdigest()[:8])
    draft = CheckpointMetadata(
        idempotency_key=name,
        run_id=run_id,
        model_id=model_id,
        name=name,
        step=step,
        epoch=epoch,
        term=term,
        format=found.checkpoint.format,
        weights=found.checkpoint.objects,
        topology=layout.TOPOLOGY,
        objects=tuple(StoredObject(path=path, digest=digests[path]) for path in found.checkpoint.objects),
        imported_from=found.place.uri,
        num_params=0,
        num_bytes=sum(digests[path].size for path in found.checkpoint.objects),
    )
    topology = _topology(read_recognised(found.place, "", found.checkpoint), model_id, exclude)
    if not topology.parameters:
        raise Malformed(
            f"{found.place.uri} holds no float tensor of two axes or more that is none of an optimizer's, shares no "
            "bytes with another and was not excluded, so there is nothing to prune; of views save clones"
        )
    stored = StoredObject(path=layout.TOPOLOGY, digest=digest_bytes(topology.canonical()))
    size = sum(parameter.size for parameter in topology.parameters.values())
    return draft.model_copy(update={"objects": (*draft.objects, stored), "num_params": size}), topology


def _topology(index: Mapping[str, TensorRef], model_id: str, exclude: Sequence[str]) -> Topology:
    """Names of one stored tensor are tied, and the first of them is the parameter's."""
    left: set[str] = set()
    for pattern in exclude:
        if not (found := {name for name in index if fnmatchcase(name, pattern)}):
            known = ", ".join(sorted(index)[:3])
            raise Malformed(f"no tensor is called {pattern!r}, which is to be excluded; there are {known}, ...")
        left |= found
    names: dict[tuple[Box, ...], list[str]] = {}
    for name, ref in sorted(index.items()):
        if name in left:
            continue
        if ref.dtype in FLOATS and len(ref.shape) >= 2 and ref.size and not ref.shared:
            names.setdefault(ref.boxes, []).append(name)
    parameters = {}
    for first, *others in names.values():
        shape = index[first].shape
        parameters[first] = Parameter(uuid=parameter_uuid(first, shape, model_id), shape=shape, aliases=tuple(others))
    return Topology(model_id=model_id, parameters=parameters)


def _state(log: Log) -> RunState | None:
    try:
        return log.tail().state
    except NoRun:
        return None


def _known(state: RunState, name: str) -> tuple[int, str] | None:
    """Record and name of the same checkpoint, imported before; a rollback has perhaps raised the term since."""
    step, _, nonce = name.split("-")
    same = (p for p in state.pairs if p.candidate is None and p.checkpoint.split("-")[::2] == [step, nonce])
    return next(((pair.record, pair.checkpoint) for pair in same), None)


def _check_imports_only(log: Log, run: ObjectStore) -> None:
    """A trainer must not find its tip moved to weights that are not its own."""
    for record in log.since(0):
        if record.kind is Kind.OPEN and record.id != OPEN:
            raise NotAllowed(
                f"a trainer opened the run {run.uri} (record {record.n}), and its checkpoints follow each other; "
                "import into a run of its own"
            )


def _check_signed(ready: bytes, trust: Trust | None) -> None:
    if trust is None:
        return
    try:
        open_envelope(ready, PAYLOAD, trust, roles=WRITERS)
    except Untrusted as error:
        raise Untrusted(
            "EMRAKUL_TRUST is set, so what is imported must be signed, or nobody would read it: "
            "set EMRAKUL_SIGNING_KEY to a key that is trusted for trainer"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Import, and print what was done as JSON; the exit code is leyline.exits'."""
    parser = argparse.ArgumentParser(
        prog="python -m kasmina.foreign",
        description="Import a checkpoint that kasmina never saw.",
        epilog=f"exit codes: {exits.DONE} it is in the log; {exits.BAD_INPUT} it cannot be imported; {exits.STORE} the "
        "store refused or did not answer",
    )
    parser.add_argument("--from", required=True, dest="origin", help="folder or file of the checkpoint")
    parser.add_argument("--run", required=True, help="URI of the run")
    parser.add_argument("--step", type=int, help="training step of the checkpoint")
    parser.add_argument("--epoch", type=int, default=0, help="training epoch of the checkpoint")
    parser.add_argument("--model-id", help="name of the model, of a new run")
    parser.add_argument("--exclude", action="append", default=[], help="tensors that no cycle may touch, as in a shell")
    wanted = parser.parse_args(argv)
    try:
        done = adopt(
            open_store(wanted.run),
            wanted.origin,
            step=wanted.step,
            epoch=wanted.epoch,
            model_id=wanted.model_id,
            exclude=wanted.exclude,
            keys=signing_keys_from_environment(),
            trust=trust_from_environment(),
        )
    except (Refused, Unreachable, Unsuitable) as error:
        print(error, file=sys.stderr)
        return exits.STORE
    except (Malformed, NotAllowed, StoreError) as error:
        print(error, file=sys.stderr)
        return exits.BAD_INPUT
    print(json.dumps(asdict(done)))
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
