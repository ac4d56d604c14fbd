"""What may fail while a cycle runs, and how it ends then: one test for each row of docs/failure-modes.md."""

from __future__ import annotations

import base64
import os
import pickle
import re
import signal
import zipfile
from collections.abc import Callable
from datetime import datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

import drafts
import hostile
import trainers
from builders import masks_of, write_masks
from commands import appears, emrakul_run, wait
from emrakul.control import Controller, Scale
from emrakul.core.snapshot import Phase
from emrakul.runtime.local import LocalRuntime
from emrakul.strategy.requests import ROUND
from histories import History
from hostile import IMPORTANCE, TOPOLOGY, WEIGHTS, Shell
from leyline import answers, layout
from leyline.crypt import DATA_KEY, DataKey, KeyRing
from leyline.envelope import SIGNING_KEY, TRUST, Trust, generate_key
from leyline.ids import parameter_uuid
from leyline.local import LocalStore
from leyline.log import Log
from leyline.messages import Requests, StructuralAnalysisResponse
from leyline.open import open_store
from leyline.reasons import OUTCOME_OF, Outcome, Reason
from leyline.records import Kind
from leyline.store import ObjectStore
from leyline.topology import Parameter, Topology
from runs import asked, published_run, settings
from servers import free_ports, seaweedfs


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("EMRAKUL_", "AWS_")):
            monkeypatch.delenv(name)


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    """A run that a cycle has gone over once: masks are in force."""
    store = LocalStore(tmp_path / "run")
    published_run(store, masked=True)
    return store


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, capsys)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "phase", "limit", "reason"),
    [
        ("elesh", "analyse", "checkpointAnalysisTimeout", "AnalysisTimeout"),
        ("kasmina.apply", "apply", "checkpointAnalysisTimeout", "ApplyTimeout"),
        ("urabrask", "validate", "validationTimeout", "ValidationTimeout"),
    ],
)
def test_a_worker_that_hangs_is_stopped_at_the_limit(
    run: LocalStore, tmp_path: Path, module: str, phase: str, limit: str, reason: str
) -> None:
    tip = Log(run).tail().state.tip_pair
    command = emrakul_run(tmp_path, run.uri, "--workers", "1", more=f"    {limit}: 5\n")
    worker = command.worker(module)
    appears(hostile.folder(run), f"cycles/c{_base(run)}-*/started/{phase}-0")
    os.kill(worker, signal.SIGSTOP)
    ended = command.end()
    assert (ended["exit"], ended["outcome"], ended["reason"]) == (6, "Skipped", reason)
    assert "more than 5 s" in ended["message"]
    assert not Path(f"/proc/{worker}").exists()
    assert Log(run).tail().state.tip_pair == tip


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_worker_out_of_memory_tries_again_and_then_the_cycle_is_skipped(run: LocalStore, shell: Shell) -> None:
    _publish_huge(run)
    said = shell.ended(run, "Skipped/OutOfMemory", code=6, more="    analysisMemoryLimit: 96MB\n", structured=False)
    assert "limit is 96 MB" in said
    peak = float(said.partition("peak was ")[2].partition(" MB")[0])
    assert 30 < peak < 150  # the worker's own, not what this process held when it started it
    assert list(hostile.folder(run).glob(f"cycles/c{_base(run)}-*/attempts/*/1"))


def _publish_huge(run: ObjectStore) -> None:
    """A parameter of 64 MB more: for basic pruning it takes memory, and a while."""
    huge = np.zeros((4096, 4096), dtype=np.float32)
    held = hostile.objects(run)
    topology = Topology.parse(held[TOPOLOGY], name=TOPOLOGY)
    known = Parameter(uuid=parameter_uuid("huge", huge.shape, topology.model_id), shape=huge.shape)
    larger = topology.model_copy(update={"parameters": {**topology.parameters, "huge": known}})
    hostile.publish(run, {WEIGHTS: hostile.with_tensor(held[WEIGHTS], "huge", huge), TOPOLOGY: larger.canonical()})


def _base(run: ObjectStore) -> int:
    tip = Log(run).tail().state.tip
    assert tip is not None
    return tip


# --- statistics -------------------------------------------------------------------------------------------------------

OURS = KeyRing(DataKey(b"o" * 32))
THEIRS = base64.b64encode(b"t" * 32).decode()


def _flipped(store: ObjectStore) -> None:
    hostile.publish(store)
    hostile.replace(store, hostile.key(store, IMPORTANCE), hostile.flipped)


@pytest.mark.parametrize(
    ("make", "reason", "says"),
    [
        (_flipped, "ImportanceCorrupt", "SHA-256"),
        (lambda s: hostile.publish(s, missing=[IMPORTANCE]), "ImportanceCorrupt", "does not exist"),
        (lambda s: hostile.publish(s, {IMPORTANCE: b"no statistics at all"}), "ImportanceCorrupt", IMPORTANCE),
        (lambda s: hostile.publish(s, statistics={"run_id": "theirs"}), "ImportanceForeign", "of run theirs"),
        (lambda s: hostile.publish(s, statistics={"lineage": ("150-1-0",)}), "ImportanceForeign", "150-1-0"),
        (lambda s: hostile.publish(s, statistics={"step": 9}), "ImportanceStale", "201 steps old"),
        (lambda s: hostile.publish(s, statistics={"samples": 199}), "TooFewSamples", "199 samples"),
        (lambda s: hostile.publish(s, without_statistics=True), "NoImportance", "has no importance statistics"),
    ],
)
def test_statistics_that_cannot_be_used_prune_nothing_and_the_masks_stay(
    run: LocalStore, shell: Shell, make: Callable[[ObjectStore], object], reason: str, says: str
) -> None:
    make(run)
    before, masks = hostile.keys(run), Log(run).tail().state.tip_pair.masks  # type: ignore[union-attr]
    assert masks is not None
    said = shell.ended(run, f"Skipped/{reason}", code=6)
    assert says in said
    assert said.count("ublish") <= 1, said  # the remedy is said once
    assert hostile.only_work(before, run)
    assert Log(run).tail().state.tip_pair.masks == masks  # type: ignore[union-attr]


def test_encrypted_statistics_that_were_tampered_with(
    run: LocalStore, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.publish(run, ring=OURS, tampered=True)
    monkeypatch.setenv(DATA_KEY, base64.b64encode(OURS.current.secret).decode())
    assert IMPORTANCE in shell.ended(run, "Skipped/ImportanceCorrupt", code=6)


def test_a_wrong_data_key_says_so_and_the_right_one_goes_on(
    run: LocalStore, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.publish(run, ring=OURS)
    assert f"{DATA_KEY} is not set" in shell.ended(run, "Skipped/WrongDataKey", code=6)
    monkeypatch.setenv(DATA_KEY, THEIRS)
    assert "encrypted under data key" in shell.ended(run, "Skipped/WrongDataKey", "--again", code=6)
    monkeypatch.setenv(DATA_KEY, "no key at all")
    assert "neither base64 nor a path" in shell.ended(run, "Skipped/WrongDataKey", "--again", code=6)
    assert not any(record.kind is Kind.ROLLBACK for record in Log(run).since(0))
    monkeypatch.setenv(DATA_KEY, base64.b64encode(OURS.current.secret).decode())
    assert shell.run(run, "--again", code=0)["outcome"] == "Committed"


def test_magnitude_needs_no_statistics(run: LocalStore, shell: Shell) -> None:
    hostile.publish(run, without_statistics=True)
    ended = shell.run(run, code=0, more="    importance: magnitude\n")
    assert ended["outcome"] == "Committed"
    assert [budget["kind"] for budget in ended["budgets"]] == ["channel"]
    assert all(budget["achieved"] == budget["allowed"] > 0 for budget in ended["budgets"])


# --- scorers and workers ----------------------------------------------------------------------------------------------


class Failing(LocalRuntime):
    """Answers the first round as a worker does whose scorer raised; everything else is done by real workers."""

    store: ObjectStore

    def start(self, phase: Phase, *, launch: int, step: int, workers: int, memory_bytes: int, now: datetime) -> None:
        if phase is Phase.ANALYSE and step == 0:
            cycle = self._cycle_uri.rpartition("/")[2]
            name = layout.requests(cycle, 0)
            for request in Requests.parse(self.store.get(name), name=name).requests:
                message = StructuralAnalysisResponse(
                    idempotency_key=request.idempotency_key,
                    request=request.id,
                    status="failed",
                    reason="WorkersFailed",
                    message=f"request {request.id} could not be scored: ZeroDivisionError: division by zero",
                )
                self.store.put_if_absent(answers.path(cycle, request.id, 0, 0), answers.pack(message, {}))
        super().start(phase, launch=launch, step=step, workers=workers, memory_bytes=memory_bytes, now=now)


def test_a_scorer_that_fails_leaves_the_cycle_to_single_weights(run: LocalStore) -> None:
    def runtime(uri: str) -> LocalRuntime:
        made = Failing(uri)
        made.store = run
        return made

    ended, _ = Controller(run, Log(run), asked(run, settings()), runtime, scale=Scale(override=1)).run()
    assert ended.end is not None and ended.decision is not None
    decision = ended.decision
    assert (decision.method, decision.groups) == ("basic", ())
    assert decision.weights
    assert "division by zero" in decision.fallback
    assert "Single weights were scored, because structured analysis failed" in ended.end.message
    assert ended.end.kind is Kind.PRUNE, ended.end.message


def test_a_request_that_kills_its_worker_three_times_ends_the_analysis(run: LocalStore, tmp_path: Path) -> None:
    _publish_huge(run)
    command = emrakul_run(tmp_path, run.uri, "--workers", "1", structured=False)
    (path,) = appears(hostile.folder(run), f"cycles/c{_base(run)}-*/requests-{ROUND['histogram']}.json")
    requests = Requests.parse(path.read_bytes(), name=path.name).requests
    request = next(one for one in requests if any(piece.parameter == "huge" for piece in one.slices))
    for attempt in range(3):
        worker = command.worker("elesh")
        appears(path.parent, f"attempts/{request.id}/{attempt}")
        os.kill(worker, signal.SIGKILL)
        wait(lambda gone=worker: gone not in command.workers())  # type: ignore[misc]
    ended = command.end()
    assert (ended["exit"], ended["outcome"], ended["reason"]) == (6, "Skipped", "WorkersFailed"), ended
    assert "killed by signal 9" in ended["message"]
    assert Log(run).tail().state.live is None


# --- loading ----------------------------------------------------------------------------------------------------------


def test_masks_that_cannot_be_applied_are_rolled_back_by_the_load(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    trainer = trainers.start(store)
    trainer.train(2)
    good = trainer.publish(10)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    log, base = Log(store), good.record.n
    # of another model: every digest is right, and no parameter is the one that it was made for
    known = trainers.topology().parameters
    swapped = {name: one.model_copy(update={"uuid": one.uuid[::-1]}) for name, one in known.items()}
    other = trainers.topology().model_copy(update={"parameters": swapped})
    masks = masks_of(other, {other.groups[0].id: [0]})
    log.append(drafts.admitted(base), base=base)
    ref = write_masks(store, layout.masks(drafts.cycle(base), base), masks)
    log.append(drafts.pruned(base, masks=ref), base=base)

    again = trainers.start(store, seed=1)

    record = Log(store).tail().record
    assert (record.kind, record.reason, record.tip.record if record.tip else None) == (
        Kind.ROLLBACK,
        "LoadFailure",
        base,
    )
    assert "UUID" in record.message
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
    again.train(1)
    assert again.publish(20).record.kind is Kind.PUBLISH


# --- the store --------------------------------------------------------------------------------------------------------


def test_a_store_that_goes_away_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = free_ports(10)
    with seaweedfs(tmp_path / "weed", numbers=ports) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = open_store(f"s3://{server.bucket}/run")
        published_run(store)
        command = emrakul_run(tmp_path, store.uri, "--workers", "1")
        command.worker("elesh")
        tip = Log(store).tail().state.tip
    gone = command.end()
    assert gone["exit"] == 75
    sentence = gone["said"].strip().splitlines()[-1]
    assert sentence.startswith("emrakul: ")
    assert "does not answer" in sentence or "cannot be reached" in sentence
    with seaweedfs(tmp_path / "weed", numbers=ports):
        state = Log(store).tail().state
        assert state.tip == tip
        assert state.live is not None
        assert not any("/candidate/MANIFEST" in head.key for head in store.list("cycles/"))
        ended = emrakul_run(tmp_path, store.uri, "--workers", "1").end()
        assert (ended["exit"], ended["outcome"], ended["cycle"]) == (0, "Committed", state.live.id), ended


# --- hostile input ----------------------------------------------------------------------------------------------------


class Trap:
    """Runs a command wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def _bomb() -> bytes:
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 100_000_000)
    return archive.getvalue()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _, trap: pickle.dumps(trap), "begins like a pickle"),
        (lambda _, __: _bomb(), "begins like a zip archive"),
        (lambda data, _: b"\x10\0\0\0\0\0\0\0{not JSON at all" + data, "the header is not JSON"),
        (lambda data, _: hostile.reshaped(data, "convs.1.weight", [16, 16, 9]), "the topology says [16, 16, 3, 3]"),
        (lambda data, _: hostile.with_value(data, "convs.1.weight", b"\0\0\xc0\x7f"), "convs.1.weight holds nan"),
    ],
    ids=["pickle", "zip bomb", "bad header", "wrong shape", "NaN"],
)
def test_a_hostile_checkpoint_fails_and_nothing_of_it_is_executed_or_written(
    run: LocalStore, shell: Shell, tmp_path: Path, change: Callable[[bytes, Trap], bytes], says: str
) -> None:
    trap = tmp_path / "sprung"
    hostile.publish(run, {WEIGHTS: change(hostile.objects(run)[WEIGHTS], Trap(trap))})
    before = hostile.keys(run)
    said = shell.ended(run, "Failed/InvalidInput", code=4)
    assert says in said
    assert hostile.ready(run).name in said
    assert not trap.exists()
    assert hostile.only_work(before, run)


def test_an_unsigned_checkpoint_fails_where_signatures_are_required(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "trust"
    folder.mkdir()
    key = generate_key(tmp_path / "all.pem")
    for role in ("trainer", "operator"):
        (folder / f"{role}.pem").write_bytes((tmp_path / "all.pub.pem").read_bytes())
    monkeypatch.setenv(TRUST, str(folder))
    monkeypatch.setenv(SIGNING_KEY, str(tmp_path / "all.pem"))
    run = History(LocalStore(tmp_path / "run"), keys=(key,), trust=Trust.from_folder(folder))
    run.publish(100)
    before = hostile.keys(run.store)
    ended = shell.run(run.store, code=4)
    assert (ended["outcome"], ended["reason"]) == ("Failed", "Untrusted")
    assert "READY.json" in ended["message"]
    assert hostile.only_work(before, run.store)


def test_three_failures_in_a_row_open_the_breaker(run: LocalStore, shell: Shell) -> None:
    good = hostile.ready(run).name
    for _ in range(3):
        hostile.publish(run, {TOPOLOGY: b"{}"}, of=good)
        assert "topology.json" in shell.ended(run, "Failed/InvalidInput", code=4)
    assert Log(run).tail().state.breaker.state == "open"
    hostile.publish(run, of=good)
    said = shell.ended(run, "Skipped/BreakerOpen", code=6)
    assert "3 cycles in a row failed" in said
    assert not list(hostile.folder(run).glob(f"cycles/c{_base(run)}-*/attempts"))


# --- what the documentation says of all this --------------------------------------------------------------------------


def test_every_way_to_fail_has_its_row() -> None:
    page = (Path(__file__).parents[2] / "docs" / "failure-modes.md").read_text()
    named = set(re.findall(r"`([A-Z]\w+)/(\w+)`", page))
    assert all(OUTCOME_OF[Reason(reason)] == outcome for outcome, reason in named)
    told = {Outcome.SKIPPED, Outcome.ROLLED_BACK, Outcome.FAILED}
    assert {reason for reason in Reason if OUTCOME_OF[reason] in told} <= {reason for _, reason in named}
