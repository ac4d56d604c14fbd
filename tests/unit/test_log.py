"""The log: what each rule refuses, how its end is found, and what becomes of tampering, crashes and rivals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from drafts import (
    admitted,
    cycle,
    ended,
    genesis,
    masks_of,
    opened,
    pruned,
    published,
    report,
    resumed,
    retired,
    rolled_back,
)
from leyline import layout
from leyline.envelope import SigningKey, Trust, Untrusted
from leyline.local import LocalStore
from leyline.log import Log, NoRun, NotAllowed, StoreReverted, verify
from leyline.model import Malformed
from leyline.records import Draft
from leyline.rules import kept, protected
from leyline.store import NotFound, Unreachable
from wrapped import Failing, Killed, Mortal, Wrapped


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def write(store: LocalStore, *drafts: Draft) -> Log:
    """A run with these records after its genesis."""
    log = Log(store)
    log.create(genesis())
    for draft in drafts:
        log.append(draft, base=0)
    return log


def refused(log: Log, draft: Draft) -> str:
    """The sentence, after nothing was written."""
    before = log.tail().record.n
    with pytest.raises(NotAllowed) as error:
        log.append(draft, base=before)
    assert log.tail().record.n == before
    return str(error.value)


ONE = (opened("a"), published("1-1-00000001", term=1))
"""Records 1 and 2: a trainer and its first checkpoint."""
PRUNED = (*ONE, admitted(2), pruned(2))
"""Records 3 and 4: a cycle on it, committed."""


# --- rules ----------------------------------------------------------------------------------------------------------


def test_a_publish_becomes_the_tip_and_the_first_one_the_baseline(store: LocalStore) -> None:
    state = write(store, *ONE, published("2-1-00000002", term=1, step=2)).tail().state
    assert (state.tip, state.baseline, state.term) == (3, 2, 1)
    assert state.pair(3).parent == 2  # type: ignore[union-attr]


def test_publish_needs_an_open_and_the_newest_term(store: LocalStore) -> None:
    log = write(store)
    assert "never opened" in refused(log, published("1-0-00000001", term=0))
    log.append(opened("a"), base=0)
    log.append(opened("b"), base=0)
    assert "opened by another trainer" in refused(log, published("1-1-00000001", term=1))
    log.append(published("1-2-00000001", term=2), base=0)
    log.append(rolled_back(3), base=0)
    assert "rolled back" in refused(log, published("2-2-00000002", term=2))
    log.append(published("2-3-00000002", term=3), base=0)


def test_publish_carries_exactly_the_tips_masks(store: LocalStore) -> None:
    log = write(store, *ONE)
    assert "the tip has none" in refused(log, published("2-1-00000002", term=1, masks=masks_of(2)))
    assert "baked" in refused(log, published("2-1-00000002", term=1, baked=masks_of(2)))
    log.append(admitted(2), base=0)
    log.append(pruned(2), base=0)
    assert "names no masks" in refused(log, published("2-1-00000002", term=1))
    other = masks_of(2).model_copy(update={"digest": "00" * 32})
    assert "read on" in refused(log, published("2-1-00000002", term=1, masks=other))
    log.append(published("2-1-00000002", term=1, masks=masks_of(2), baked=masks_of(2)), base=0)


def test_one_checkpoint_is_published_once(store: LocalStore) -> None:
    log = write(store, *ONE)
    assert "already" in refused(log, published("1-1-00000001", term=1))
    assert log.append(published("1-1-00000001", term=1), base=0).record.n == 2


def test_a_publish_with_more_masks_than_its_weights_carry_is_provisional(store: LocalStore) -> None:
    log = write(store, *PRUNED, published("2-1-00000002", term=1, masks=masks_of(2), report=report()))
    pair = log.tail().state.tip_pair
    assert pair is not None
    assert pair.provisional
    assert not pair.good
    assert "provisional" in refused(log, admitted(5))
    log.append(published("3-1-00000003", term=1, masks=masks_of(2), baked=masks_of(2), report=report()), base=0)
    pair = log.tail().state.tip_pair
    assert pair is not None
    assert pair.good


@pytest.mark.parametrize(
    ("correct", "state", "good"), [(94, "stable", True), (90, "stable", False), (95, "unstable", False)]
)
def test_a_masked_publish_is_good_by_its_report(store: LocalStore, correct: int, state: str, good: bool) -> None:
    said = report(correct, state=state)
    before = published("1-1-00000001", term=1, report=report(95))
    log = write(
        store,
        opened("a"),
        before,
        *PRUNED[2:],
        published("2-1-00000002", term=1, masks=masks_of(2), baked=masks_of(2), report=said),
    )
    pair = log.tail().state.tip_pair
    assert pair is not None
    assert pair.good is good


def test_the_validators_accuracy_is_no_measure_for_the_trainers_reports(store: LocalStore) -> None:
    """Its evaluation set may be another: 0.93 at the prune, and the trainer says 0.80 before and after."""
    before = published("1-1-00000001", term=1, report=report(80))
    after = published("2-1-00000002", term=1, masks=masks_of(2), baked=masks_of(2), report=report(80))
    pair = write(store, opened("a"), before, *PRUNED[2:], after).tail().state.tip_pair
    assert pair is not None
    assert pair.good


def test_one_cycle_at_a_time_on_a_base_that_stands(store: LocalStore) -> None:
    log = write(store, *ONE, published("2-1-00000002", term=1, step=2), admitted(2))
    assert "is live" in refused(log, admitted(3))
    log.append(ended(2), base=0)
    assert "protocol 9" in refused(log, admitted(3, protocol=9))
    assert "no pair" in refused(log, admitted(1))
    log.append(rolled_back(2), base=0)
    assert "condemned" in refused(log, admitted(3))


def test_a_cycle_is_admitted_once_wherever_its_writer_looks(store: LocalStore) -> None:
    log = write(store, *ONE, admitted(2), ended(2))
    assert log.append(admitted(2), base=4).record.n == 3
    assert log.tail().state.live is None


def test_a_prune_needs_its_live_cycle_its_base_as_tip_and_its_verdict(store: LocalStore) -> None:
    log = write(store, *ONE)
    assert "never admitted" in refused(log, pruned(2))
    log.append(admitted(2), base=0)
    draft = pruned(2)
    assert "no verdict" in refused(log, draft.model_copy(update={"evidence": {}}))
    other = {layout.verdict(cycle(2), 7): "ef" * 32}
    assert "no verdict" in refused(log, draft.model_copy(update={"evidence": other}))
    assert "masks of its candidate" in refused(log, draft.model_copy(update={"masks": None}))
    assert "masks of its candidate" in refused(log, draft.model_copy(update={"masks": masks_of(2, on=7)}))
    body = draft.body.model_copy(update={"candidate": "cycles/other/on-2/candidate/"})
    assert "names candidate" in refused(log, draft.model_copy(update={"body": body}))
    log.append(published("2-1-00000002", term=1, step=2), base=0)
    assert "tip moved to record 4" in refused(log, draft)
    log.append(pruned(2, on=4), base=0)
    assert log.tail().state.tip == 5


def test_a_cycle_ends_once(store: LocalStore) -> None:
    log = write(store, *ONE, admitted(2), ended(2))
    assert "has ended" in refused(log, pruned(2))
    assert log.append(pruned(2), base=2).record.body.kind == "outcome"  # a late prune finds the outcome
    assert log.tail().state.counters == {"Skipped/Superseded": 1}


def test_a_rollback_there_and_back_still_refuses_the_late_prune(store: LocalStore) -> None:
    log = write(store, *ONE, admitted(2), published("2-1-00000002", term=1, step=2), rolled_back(2))
    assert log.tail().state.tip == 2
    assert "rolled back by record 5" in refused(log, pruned(2))
    log.append(ended(2, reason="RunRolledBack"), base=0)


def test_a_rollback_condemns_what_came_later_and_only_a_person_brings_it_back(store: LocalStore) -> None:
    log = write(store, *ONE, published("2-1-00000002", term=1, step=2), published("3-1-00000003", term=1, step=3))
    log.append(rolled_back(2, by="trainer"), base=0)
    state = log.tail().state
    assert [pair.record for pair in state.pairs if pair.condemned] == [3, 4]
    assert (state.tip, state.term, state.hold) == (2, 2, None)
    assert "already the tip" in refused(log, rolled_back(2, by="operator", name="again"))
    assert "only a person" in refused(log, rolled_back(3, by="operator"))
    assert "no pair" in refused(log, rolled_back(1))
    log.append(rolled_back(3, by="person"), base=0)
    state = log.tail().state
    assert [pair.record for pair in state.pairs if pair.condemned] == [4]
    assert state.hold == "back-to-3"


def test_only_the_rollback_in_force_is_resumed(store: LocalStore) -> None:
    log = write(store, *ONE)
    assert "not held" in refused(log, resumed("back-to-2"))
    log.append(rolled_back(2), base=0)
    assert "held by rollback back-to-2" in refused(log, resumed("another"))
    log.append(resumed("back-to-2"), base=0)
    assert log.tail().state.hold is None


def test_what_is_needed_is_not_retired(store: LocalStore) -> None:
    names = [f"{step}-1-{step:08x}" for step in range(1, 11)]
    log = write(store, opened("a"), *(published(name, term=1, step=step) for step, name in enumerate(names)))
    log.append(admitted(4), base=0)  # record 12; the pairs are 2 to 11
    for record, why in ((2, "baseline"), (4, "live cycle"), (6, "rollback depth"), (11, "the tip")):
        assert why in refused(log, retired(record))
    assert "no pair" in refused(log, retired(1))
    assert "still needed" in refused(log, retired(3, 2))
    log.append(retired(3, 5), base=0)
    assert "retired already" in refused(log, retired(3))
    assert "retired" in refused(log, rolled_back(5))


def test_a_retired_parent_leaves_its_children_their_ancestors(store: LocalStore) -> None:
    bad = report(state="unstable")
    log = write(store, *ONE, published("2-1-00000002", term=1, report=bad), published("3-1-00000003", term=1))
    log.append(retired(3), base=0)
    state = log.tail().state
    assert [pair.record for pair in state.ancestors(4)] == [2]
    assert 2 in protected(state)


def test_a_later_checkpoint_keeps_the_mask_file_of_a_retired_candidate(store: LocalStore) -> None:
    mine = {"masks": masks_of(2), "baked": masks_of(2)}
    later = [published(f"{step}-1-{step:08x}", term=1, step=step, report=report(), **mine) for step in range(2, 9)]
    log = write(store, *PRUNED, *later, retired(4))
    assert kept(log.tail().state).candidates == frozenset()
    assert kept(log.tail().state).masks == {masks_of(2).path}


def test_the_log_begins_with_one_genesis_and_is_one_run(store: LocalStore) -> None:
    with pytest.raises(NoRun, match="holds no run"):
        Log(store).tail()
    log = write(store)
    assert "already has a genesis" in refused(log, Draft(id="again", body=genesis().body))
    before = {head.key for head in store.list("")}
    with pytest.raises(NotAllowed, match="another run URI"):
        Log(store).create(genesis(model="other"))
    assert {head.key for head in store.list("")} == before
    assert Log(store).create(genesis()).record.n == 0


# --- tampering ------------------------------------------------------------------------------------------------------


def replace(store: LocalStore, n: int, data: bytes) -> None:
    store.delete(layout.record(n))
    store.put_if_absent(layout.record(n), data)


def test_verify_walks_the_whole_chain(store: LocalStore) -> None:
    log = write(store, *PRUNED, rolled_back(2), resumed("back-to-2"))
    entries = list(verify(Log(store)))
    assert [entry.record.n for entry in entries] == list(range(7))
    assert entries[-1].state == log.tail().state


def test_a_changed_record_breaks_the_chain(store: LocalStore) -> None:
    log = write(store, *PRUNED)
    rival = LocalStore(Path(str(store.uri)[7:]).parent / "rival")
    write(rival, opened("a"), published("9-1-00000009", term=1, step=9))
    replace(store, 2, rival.get(layout.record(2)))
    with pytest.raises(Malformed, match="record 3 does not follow record 2"):
        list(verify(Log(store)))
    assert log.tail().record.n == 4


def test_records_that_changed_places_are_noticed(store: LocalStore) -> None:
    write(store, *ONE)
    replace(store, 2, store.get(layout.record(1)))
    with pytest.raises(Malformed, match="says it is record 1"):
        Log(store).tail()


def test_a_record_that_claims_another_state_is_refused(store: LocalStore) -> None:
    from leyline.envelope import open_envelope, seal
    from leyline.log import PAYLOAD

    write(store, *PRUNED)
    key = layout.record(4)
    document = json.loads(open_envelope(store.get(key), PAYLOAD, None, roles=(), name=key))
    document["state"] = Log(store).read(2)[0].state
    replace(store, 4, seal(json.dumps(document).encode(), PAYLOAD, ()))
    with pytest.raises(Malformed, match="claims a state"):
        list(verify(Log(store)))


def test_a_damaged_state_is_named(store: LocalStore) -> None:
    log = write(store, *ONE)
    key = layout.state(log.tail().record.state)
    data = store.get(key)
    store.delete(key)
    with pytest.raises(Malformed, match="is missing"):
        Log(store).tail()
    store.put_if_absent(key, data.replace(b'"term":1', b'"term":7'))
    with pytest.raises(Malformed, match="is not what record 2 rests on"):
        Log(store).tail()


def test_a_restored_older_log_stops_whoever_saw_more(store: LocalStore) -> None:
    log = write(store, *PRUNED)
    tail = log.tail()
    store.delete(layout.record(4))
    with pytest.raises(StoreReverted, match="record 4 was seen before and is gone"):
        Log(store, seen=(4, tail.digest)).tail()
    with pytest.raises(StoreReverted, match="is gone"):  # in memory: no record 5 behind a hole
        log.append(published("2-1-00000002", term=1, masks=masks_of(2)), base=4)
    with pytest.raises(StoreReverted, match="is gone"):
        Log(store, seen=(4, tail.digest)).append(ended(2), base=3)


def test_another_log_in_the_same_place_stops_whoever_knew_the_first(store: LocalStore) -> None:
    log = write(store, *PRUNED)
    seen = (4, log.tail().digest)
    for n in (3, 4):
        store.delete(layout.record(n))
    other = Log(store)
    other.append(published("8-1-00000008", term=1), base=0)
    other.append(published("9-1-00000009", term=1), base=0)
    with pytest.raises(StoreReverted, match="another one"):
        Log(store, seen=seen).tail()
    other.append(published("10-1-0000000a", term=1), base=0)
    with pytest.raises(StoreReverted, match="another one"):
        log.tail()


def test_a_log_that_is_open_already_is_held_to_what_a_status_saw(store: LocalStore) -> None:
    log = write(store, *PRUNED)
    tail = log.tail()
    log.expect(4, tail.digest)
    with pytest.raises(StoreReverted, match="record 9 was seen before and is gone"):
        log.expect(9, tail.digest)
    with pytest.raises(StoreReverted, match="another one"):
        log.expect(3, tail.digest)


def test_what_was_read_and_is_gone_is_told_by_whoever_reads_it_again(store: LocalStore) -> None:
    log = write(store, *PRUNED)
    newest = log.tail().record.n
    log.check()
    store.delete(layout.record(newest))
    assert log.tail().record.n == newest, "nothing new, as far as one can see"
    for look in (log.check, lambda: log.read(newest), lambda: list(log.since(0))):
        with pytest.raises(StoreReverted, match=f"record {newest} was seen before and is gone"):
            look()
    with pytest.raises(NotFound):
        log.read(newest + 1)


# --- trust ----------------------------------------------------------------------------------------------------------


def test_where_trust_is_configured_each_kind_needs_its_role(store: LocalStore) -> None:
    trainer, operator, stranger = (SigningKey(Ed25519PrivateKey.generate()) for _ in range(3))
    trust = Trust(
        {"trainer": (trainer.private.public_key(),), "operator": (operator.private.public_key(),)},
    )
    as_trainer = Log(store, keys=(trainer,), trust=trust)
    as_trainer.create(genesis())
    for draft in ONE:
        as_trainer.append(draft, base=0)
    for keys in ((), (stranger,), (operator,)):
        with pytest.raises(Untrusted, match="not signed by a key trusted for trainer"):
            Log(store, keys=keys, trust=trust).append(published("2-1-00000002", term=1), base=0)
    with pytest.raises(Untrusted, match="trusted for operator"):
        as_trainer.append(admitted(2), base=0)
    with pytest.raises(Untrusted, match="trusted for operator"):  # no trainer rolls back in a person's name
        as_trainer.append(rolled_back(2, by="person"), base=0)
    assert as_trainer.tail().record.n == 2
    as_operator = Log(store, keys=(operator,), trust=trust)
    as_operator.append(admitted(2), base=0)
    assert [entry.record.n for entry in verify(Log(store, trust=trust))] == [0, 1, 2, 3]


def test_an_unsigned_record_is_refused_by_readers_with_trust_and_noticed_by_others(store: LocalStore) -> None:
    trainer = SigningKey(Ed25519PrivateKey.generate())
    trust = Trust({"trainer": (trainer.private.public_key(),)})
    Log(store, keys=(trainer,)).create(genesis())
    Log(store).append(opened("a"), base=0)
    with pytest.raises(Untrusted, match=r"log/0/1\.json is not signed"):
        Log(store, trust=trust).tail()
    plain = Log(store)
    list(verify(plain))
    assert not plain.signed


# --- finding the end, crashes, rivals -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 40, 100])
@pytest.mark.parametrize("known", [0.0, 0.5, 1.0])
def test_the_end_is_found_by_doubling_and_bisection(store: LocalStore, n: int, known: float) -> None:
    log = write(store, *(opened(str(number)) for number in range(n)))
    start = int(n * known)
    seen = (start, log.read(start)[1]) if known else None
    counted = Wrapped(store)
    assert Log(counted, seen=seen).tail().record.n == n
    assert counted.seen["head"] <= 2 * math.log2(n - start + 1) + 2
    assert counted.seen["get"] <= 7  # the end, its state, what comes before it, the genesis, and what comes after


def test_a_record_of_another_run_behind_ours_is_not_taken_for_the_end(store: LocalStore, tmp_path: Path) -> None:
    write(store, *ONE)
    other = LocalStore(tmp_path / "other")
    write(other, *ONE, published("2-1-00000002", term=1, step=2))
    record, _ = Log(other).read(3)
    store.put_if_absent(layout.record(3), other.get(layout.record(3)))
    store.put_if_absent(layout.state(record.state), other.get(layout.state(record.state)))
    tampered = store.get(layout.record(2)) != other.get(layout.record(2))
    if tampered:
        with pytest.raises(Malformed, match="does not follow"):
            Log(store).tail()
    else:  # equal logs are one log
        assert Log(store).tail().record.n == 3


def test_no_news_costs_one_get(store: LocalStore) -> None:
    write(store, *ONE)
    counted = Wrapped(store)
    log = Log(counted)
    log.tail()
    counted.seen.clear()
    log.tail()
    assert counted.seen == {"get": 1}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", [1, 2])
def test_a_writer_that_is_killed_finds_or_redoes_its_record(store: LocalStore, at: int, before: bool) -> None:
    write(store, *ONE)
    draft = published("2-1-00000002", term=1, step=2)
    with pytest.raises(Killed):
        Log(Mortal(store, at=at, before=before)).append(draft, base=2)
    entry = Log(store).append(draft, base=2)
    assert entry.record.n == 3
    assert Log(store).tail().record.n == 3
    assert len(list(verify(Log(store)))) == 4


def test_a_lost_response_is_no_second_record(store: LocalStore) -> None:
    write(store, *ONE)
    log = Log(Failing(store, Unreachable("the answer was lost"), prefix="log/", writes=True, times=1))
    draft = published("2-1-00000002", term=1, step=2)
    with pytest.raises(Unreachable):
        log.append(draft, base=2)
    assert log.append(draft, base=2).record.n == 3
    assert log.tail().record.n == 3


def test_two_writers_share_one_log_and_each_is_asked_again(store: LocalStore) -> None:
    write(store, *ONE, admitted(2))
    ours, theirs = Log(store), Log(store)
    ours.tail()
    theirs.append(published("2-1-00000002", term=1, step=2), base=2)
    with pytest.raises(NotAllowed, match="tip moved to record 4"):
        ours.append(pruned(2), base=2)
    assert ours.append(ended(2), base=2).record.n == 5
    assert len(list(verify(Log(store)))) == 6


def test_a_writer_that_is_overtaken_takes_the_next_number(store: LocalStore) -> None:
    log = write(store, *ONE)

    class Rival(Wrapped):
        def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
            if key == layout.record(3):
                log.append(published("2-1-00000002", term=1), base=2)
            return super().put_if_absent(key, data)

    assert Log(Rival(store)).append(published("3-1-00000003", term=1), base=2).record.n == 4
    assert [pair.record for pair in Log(store).tail().state.pairs] == [2, 3, 4]


def test_a_condition_of_the_callers_own_is_asked_at_the_end_of_the_log(store: LocalStore) -> None:
    log = write(store, *ONE)
    with pytest.raises(NotAllowed, match="not while the tip is 2"):
        log.append(opened("b"), base=2, unless=lambda state: f"not while the tip is {state.tip}")
