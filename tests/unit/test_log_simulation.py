"""Trainers, operator, person and gc on one log, in any order, killed at any write; what must hold holds after each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import builders
import drafts
from kasmina.into import IntoTensors
from kasmina.load import fallbacks, load_newest
from kasmina.pair import load_pair, read_masks
from kasmina.publish import PublishRefused, Written, append_publish
from kasmina.sync import Position, news
from leyline import layout
from leyline.digest import digest_bytes, sha256_hex
from leyline.fold import RunState
from leyline.log import Log, NotAllowed, verify
from leyline.messages import CheckpointMetadata, MaskRef, StoredObject
from leyline.ready import seal_ready
from leyline.records import Draft, Kind, Prune, Rollback
from leyline.rules import kept, protected
from leyline.store import ObjectStore
from wrapped import Killed, Memory, Mortal

TOPOLOGY = builders.toy_topology()
FILES = {
    "model.safetensors": builders.safetensors(builders.toy_weights(TOPOLOGY)),
    "topology.json": TOPOLOGY.canonical(),
}
OBJECTS = tuple(StoredObject(path=path, digest=digest_bytes(data)) for path, data in FILES.items())

crashes = st.tuples(st.sampled_from([0] * 20 + [1, 2, 3, 4, 5]), st.booleans())
"""Which write of an action kills its process, if there are so many, and whether before or after it took effect."""


@dataclass
class Process:
    """A process: what it knows is gone when it is killed."""

    store: Mortal
    log: Log = field(init=False)
    term: int = 0
    step: int = 0
    seen: int = 0
    position: Position = field(default_factory=lambda: Position(opened=None, rolled_back=-1, masks=None))

    def __post_init__(self) -> None:
        self.log = Log(self.store)

    def load(self) -> None:
        loaded, state = load_newest(self.store, self.log, IntoTensors(), trust=None, may_roll_back=True)
        self.term, self.seen = state.term, state.n
        self.step = loaded.step if loaded else 0
        masks = loaded.masks if loaded else None
        self.position = replace(self.position, rolled_back=state.rolled_back, masks=masks)


def write_checkpoint(store: ObjectStore, name: str, *, step: int, term: int, baked: MaskRef | None) -> Written:
    metadata = CheckpointMetadata(
        idempotency_key=name,
        run_id="run",
        model_id=TOPOLOGY.model_id,
        name=name,
        step=step,
        epoch=1,
        term=term,
        format="safetensors",
        weights=("model.safetensors",),
        topology="topology.json",
        objects=OBJECTS,
        baked=baked,
        num_params=1,
        num_bytes=1,
    )
    for path, data in FILES.items():
        store.put_if_absent(layout.checkpoint(name, path), data)
    ready = seal_ready(metadata, ())
    store.put_if_absent(layout.checkpoint(name, layout.READY), ready)
    return Written(metadata=metadata, ready=sha256_hex(ready))


class Run(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.trainers: list[Process | None] = [None, None]
        self.operator = self.process()
        self.published: set[str] = set()
        self.names = 0

    def process(self) -> Process:
        return Process(Mortal(self.memory, at=0, before=True))

    def state(self) -> RunState:
        return Log(self.memory).tail().state

    def alive(self, process: Process, crash: tuple[int, bool], action: Callable[[], None]) -> bool:
        """Run an action of this process; False if it was killed."""
        process.store.arm(crash[0], before=crash[1])
        try:
            action()
        except Killed:
            return False
        finally:
            process.store.arm(0, before=True)
        return True

    @initialize()
    def begin(self) -> None:
        self.operator.log.create(drafts.genesis(model=TOPOLOGY.model_id))
        self.open(0, (0, True))
        self.publish(0, True, (0, True))

    # --- trainers -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.names % 3 == 0 or not any(self.trainers))
    @rule(who=st.integers(0, 1), crash=crashes)
    def start(self, who: int, crash: tuple[int, bool]) -> None:
        """Now and then, or every publish would be fenced."""
        self.open(who, crash)

    def open(self, who: int, crash: tuple[int, bool]) -> None:
        process = self.process()

        def action() -> None:
            self.names += 1
            entry = process.log.append(drafts.opened(str(self.names)), base=process.log.tail().record.n)
            process.position = replace(process.position, opened=entry.record.n)
            process.load()

        self.trainers[who] = process if self.alive(process, crash, action) else None

    @precondition(lambda self: any(self.trainers))
    @rule(who=st.integers(0, 1), good=st.booleans(), crash=crashes)
    def train(self, who: int, good: bool, crash: tuple[int, bool]) -> None:
        """Whoever is alive publishes."""
        self.publish(who if self.trainers[who] else 1 - who, good, crash)

    def publish(self, who: int, good: bool, crash: tuple[int, bool]) -> None:
        if (trainer := self.trainers[who]) is None:
            return
        self.names += 1
        step = trainer.step + 1
        name = f"{step}-{trainer.term}-{self.names:08x}"
        said = drafts.report(95 if good else 10)

        def action() -> None:
            written = write_checkpoint(trainer.store, name, step=step, term=trainer.term, baked=trainer.position.masks)
            try:
                append_publish(trainer.log, written, report=said, base=trainer.seen)
            except PublishRefused:
                assert self.state().term != trainer.term
            else:
                assert self.state().term == trainer.term
                self.published.add(name)
                trainer.step = step

        if not self.alive(trainer, crash, action):
            self.trainers[who] = None

    @precondition(lambda self: any(self.trainers))
    @rule(who=st.integers(0, 1), crash=crashes)
    def sync(self, who: int, crash: tuple[int, bool]) -> None:
        if (trainer := self.trainers[who]) is None:
            return

        def action() -> None:
            state = trainer.log.tail().state
            found = news(state, trainer.position)
            if found.fenced:
                raise Killed
            if found.restart:
                trainer.load()
            elif found.masks is not None:
                read_masks(trainer.store, found.masks)
                trainer.position = replace(trainer.position, masks=found.masks)
                trainer.seen = state.n

        if not self.alive(trainer, crash, action):
            self.trainers[who] = None

    # --- operator -----------------------------------------------------------------------------------------------------

    def operate(self, crash: tuple[int, bool], action: Callable[[], None]) -> None:
        if not self.alive(self.operator, crash, action):
            self.operator = self.process()

    def append(self, draft: Draft, *, base: int) -> None:
        """What the rules refuse is no harm: the operator looks again."""
        with suppress(NotAllowed):
            self.operator.log.append(draft, base=base)

    @rule(crash=crashes)
    def admit(self, crash: tuple[int, bool]) -> None:
        if (tip := self.state().tip) is not None:
            self.operate(crash, lambda: self.append(drafts.admitted(tip), base=tip))

    @precondition(lambda self: self.state().live is not None)
    @rule(passed=st.booleans(), crash=crashes)
    def commit(self, passed: bool, crash: tuple[int, bool]) -> None:
        """The live cycle writes candidate and verdict on the tip (rebased, if need be), and commits or does not."""
        state = self.state()
        live, tip = state.live, state.tip_pair
        assert live is not None
        assert tip is not None
        more = builders.masks_of(TOPOLOGY, {"conv1": [sum((tip.masks.counts if tip.masks else {}).values()) % 8]})

        def action() -> None:
            masks = more.union(read_masks(self.memory, tip.masks)) if tip.masks else more
            data = masks.to_bytes()
            path = layout.masks(live.id, tip.record)
            ref = MaskRef(path=path, digest=sha256_hex(data), counts=masks.counts())
            self.operator.store.put_if_absent(path, data)
            draft = drafts.pruned(live.base, on=tip.record, masks=ref)
            if passed:
                self.operator.store.put_if_absent(layout.verdict(live.id, tip.record), b"PASS")
                self.append(draft, base=live.base)
            else:
                self.append(draft.model_copy(update={"evidence": {}}), base=live.base)

        self.operate(crash, action)

    @precondition(lambda self: self.state().live is not None)
    @rule(crash=crashes)
    def end(self, crash: tuple[int, bool]) -> None:
        live = self.state().live
        assert live is not None
        self.operate(crash, lambda: self.append(drafts.ended(live.base), base=live.base))

    @precondition(lambda self: self.state().pairs)
    @rule(data=st.data(), crash=crashes)
    def roll_back(self, data: st.DataObject, crash: tuple[int, bool]) -> None:
        """To the last good pair, one step, or to whatever it thinks of; the rules refuse what is condemned."""
        state = self.state()
        tip = state.tip_pair
        assert tip is not None
        sensible = [*state.ancestors(tip.record)[:1], *fallbacks(state, tip)[:1]]
        target = data.draw(st.sampled_from([*sensible, *state.pairs]))
        draft = drafts.rolled_back(target.record, by="operator", name=f"operator-{target.record}-{state.tip_moved}")
        self.operate(crash, lambda: self.append(draft, base=state.n))

    # --- person and gc ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.state().pairs)
    @rule(data=st.data(), crash=crashes)
    def person_rolls_back(self, data: st.DataObject, crash: tuple[int, bool]) -> None:
        to = data.draw(st.sampled_from([pair.record for pair in self.state().pairs]))
        self.names += 1
        draft = drafts.rolled_back(to, by="person", name=f"person-{self.names}")
        self.operate(crash, lambda: self.append(draft, base=0))

    @precondition(lambda self: self.state().hold is not None)
    @rule(crash=crashes)
    def person_resumes(self, crash: tuple[int, bool]) -> None:
        draft = drafts.resumed(str(self.state().hold))
        self.names += 1
        draft = draft.model_copy(update={"id": f"{draft.id}-{self.names}"})
        self.operate(crash, lambda: self.append(draft, base=0))

    @precondition(lambda self: self.state().pairs)
    @rule(data=st.data(), crash=crashes)
    def collect(self, data: st.DataObject, crash: tuple[int, bool]) -> None:
        state = self.state()
        record = data.draw(st.sampled_from([pair.record for pair in state.pairs]))

        def action() -> None:
            try:
                after = self.operator.log.append(drafts.retired(record), base=record).state
            except NotAllowed:
                assert record in protected(state)
                return
            needed = kept(after)
            gone = state.pair(record)
            assert gone is not None
            for head in list(self.memory.list("")):
                folder = head.key.startswith(layout.checkpoint(gone.checkpoint))
                if folder and gone.checkpoint not in needed.checkpoints:
                    self.memory.delete(head.key)
                if gone.candidate and head.key.startswith(gone.candidate) and head.key not in needed.masks:
                    self.memory.delete(head.key)

        self.operate(crash, action)

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def the_tip_always_loads(self) -> None:
        log = Log(self.memory)
        if not self.memory.objects or (tip := log.tail().state.tip) is None:
            return
        pair = log.tail().state.pair(tip)
        assert pair is not None
        assert not pair.condemned
        load_pair(self.memory, log, pair, IntoTensors(), None)

    def teardown(self) -> None:
        if not self.memory.objects:
            return
        entries = list(verify(Log(self.memory)))
        assert entries[-1].state == self.state()  # the fold of the whole log is the state of its tail
        names, admitted, ended = [], [], []
        condemned: set[int] = set()
        pairs: set[int] = set()
        for entry in entries:
            record, body = entry.record, entry.record.body
            if record.kind is Kind.PUBLISH:
                names.append(record.id)
                pairs.add(record.n)
            elif record.kind is Kind.ADMIT:
                admitted.append(record.id)
            elif record.kind is Kind.OUTCOME:
                ended.append(record.id)
            elif isinstance(body, Prune):
                ended.append(record.id)
                pairs.add(record.n)
                verdict = layout.verdict(record.id, body.base)
                assert verdict in record.evidence
                assert self.memory.get(verdict) == b"PASS"
            elif isinstance(body, Rollback):
                assert body.by == "person" or body.to not in condemned
                condemned = condemned - {body.to} | {pair for pair in pairs if pair > body.to}
            assert record.tip is None or record.tip.record not in condemned
        assert {pair.record for pair in entries[-1].state.pairs if pair.condemned} <= condemned
        assert len(names) == len(set(names))
        assert self.published <= set(names)
        assert len(admitted) == len(set(admitted))
        assert len(ended) == len(set(ended))
        assert set(ended) <= set(admitted)
        live = entries[-1].state.live
        assert set(admitted) - set(ended) == ({live.id} if live else set())


TestRun = Run.TestCase
TestRun.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
