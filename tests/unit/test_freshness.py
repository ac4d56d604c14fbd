"""When an operator is deaf, and when it is only idle."""

from __future__ import annotations

import pytest

from emrakul.cluster.freshness import Freshness

CYCLES = "pruningcycles"


@pytest.fixture
def heard() -> Freshness:
    """Two objects, listed at 0 s and told of by the watch."""
    found = Freshness()
    found.delivered(CYCLES, "a", "9")
    found.delivered(CYCLES, "b", "10")
    assert found.listed(CYCLES, "10", {"a": "9", "b": "10"}, 0) is None
    return found


def test_an_idle_operator_is_not_deaf(heard: Freshness) -> None:
    for minute in range(1, 600):
        # other things happen in the cluster: the list's version grows, the objects' do not
        assert heard.listed(CYCLES, str(10 + minute), {"a": "9", "b": "10"}, 60.0 * minute) is None


def test_an_empty_cluster_is_not_deaf() -> None:
    found = Freshness()
    assert all(found.listed(CYCLES, "1", {}, 60.0 * minute) is None for minute in range(10))


def test_what_is_never_delivered_for_ninety_seconds_is_deaf(heard: Freshness) -> None:
    assert heard.listed(CYCLES, "12", {"a": "9", "b": "12"}, 60) is None
    assert heard.listed(CYCLES, "12", {"a": "9", "b": "12"}, 149) is None
    why = heard.listed(CYCLES, "12", {"a": "9", "b": "12"}, 150)
    assert why == (
        "version 12 of pruningcycles b has been listed for 90 s, and the watch has not told of it: it does not hear "
        "any more; starting anew"
    )


def test_an_object_that_was_never_told_of_at_all_is_deaf(heard: Freshness) -> None:
    items = {"a": "9", "b": "10", "new": "11"}
    assert heard.listed(CYCLES, "11", items, 60) is None
    assert "version 11 of pruningcycles new" in (heard.listed(CYCLES, "11", items, 180) or "")


def test_late_is_not_deaf(heard: Freshness) -> None:
    assert heard.listed(CYCLES, "12", {"a": "9", "b": "12"}, 60) is None
    heard.delivered(CYCLES, "b", "12")
    assert heard.listed(CYCLES, "12", {"a": "9", "b": "12"}, 180) is None


def test_an_older_version_does_not_count_as_the_listed_one(heard: Freshness) -> None:
    heard.listed(CYCLES, "12", {"b": "12"}, 60)
    heard.delivered(CYCLES, "b", "11")
    assert heard.listed(CYCLES, "12", {"b": "12"}, 150) is not None


def test_a_busy_object_does_not_hide_a_dead_watch(heard: Freshness) -> None:
    assert heard.listed(CYCLES, "12", {"b": "12"}, 60) is None
    assert heard.listed(CYCLES, "14", {"b": "14"}, 120) is None
    assert "version 12" in (heard.listed(CYCLES, "16", {"b": "16"}, 180) or "")


def test_a_busy_object_on_a_slow_watch_is_not_deaf(heard: Freshness) -> None:
    for minute in range(1, 10):
        assert heard.listed(CYCLES, str(10 + minute), {"b": str(10 + minute)}, 60.0 * minute) is None
        heard.delivered(CYCLES, "b", str(10 + minute))


def test_what_was_delivered_at_a_higher_version_than_listed_is_fine(heard: Freshness) -> None:
    heard.delivered(CYCLES, "b", "20")
    assert all(heard.listed(CYCLES, "12", {"b": "12"}, 60.0 * minute) is None for minute in range(1, 5))


def test_versions_are_compared_as_numbers(heard: Freshness) -> None:
    heard.delivered(CYCLES, "b", "100")
    assert all(heard.listed(CYCLES, "99", {"b": "99"}, 60.0 * minute) is None for minute in range(1, 5))


def test_a_list_that_goes_back_is_deaf_at_once(heard: Freshness) -> None:
    assert heard.listed(CYCLES, "10", {"a": "9", "b": "10"}, 60) is None
    why = heard.listed(CYCLES, "8", {"a": "8"}, 120)
    assert why is not None
    assert why.startswith(
        "the listing of pruningcycles is at version 8, and 10 was seen before: the cluster's data went"
    )


def test_what_was_told_before_the_listing_must_be_in_it(heard: Freshness) -> None:
    """A restored cluster whose versions have grown past the last listing's, but not past what was delivered."""
    heard.delivered(CYCLES, "b", "20")
    known = heard.known(CYCLES)
    heard.delivered(CYCLES, "b", "21")  # while the listing is read
    assert heard.listed(CYCLES, "20", {"a": "9", "b": "20"}, 60, known=known) is None
    assert "at version 19, and 20 was seen before" in (heard.listed(CYCLES, "19", {}, 60, known=known) or "")


def test_an_object_that_goes_back_is_enough(heard: Freshness) -> None:
    """The cluster wrote so much since that the list's own version is ahead."""
    known = heard.known(CYCLES)
    why = heard.listed(CYCLES, "30", {"a": "9", "b": "8"}, 60, known=known)
    assert why is not None
    assert why.startswith("pruningcycles b is at version 8, and 10 was seen before: the cluster's data went back")
    assert heard.listed(CYCLES, "31", {"a": "9", "b": "12"}, 60, known=known) is None
    assert heard.listed("jobs", "3", {}, 120) is None  # another resource has its own


def test_an_object_that_is_deleted_while_it_is_missing_is_forgotten(heard: Freshness) -> None:
    heard.listed(CYCLES, "12", {"b": "12"}, 60)
    assert heard.listed(CYCLES, "13", {}, 120) is None
    assert heard.listed(CYCLES, "14", {"b": "12"}, 180) is None  # counted anew


def test_a_deletion_that_the_listing_did_not_know_of_yet_is_fine(heard: Freshness) -> None:
    heard.deleted(CYCLES, "b")
    assert heard.listed(CYCLES, "11", {"a": "9", "b": "10"}, 60) is None
    assert heard.listed(CYCLES, "13", {"a": "9"}, 120) is None
    assert heard.listed(CYCLES, "13", {"a": "9"}, 180) is None


def test_an_object_made_while_the_list_was_read_is_not_forgotten(heard: Freshness) -> None:
    heard.delivered(CYCLES, "new", "15")
    assert heard.listed(CYCLES, "14", {"a": "9", "b": "10"}, 60) is None
    for minute in range(2, 6):
        assert heard.listed(CYCLES, "15", {"a": "9", "b": "10", "new": "15"}, 60.0 * minute) is None


def test_memory_holds_only_what_is_there() -> None:
    found = Freshness()
    for number in range(1, 2001):
        found.delivered(CYCLES, f"uid-{number}", str(number))
        found.listed(CYCLES, str(number), {f"uid-{number}": str(number), f"never-{number}": "1"}, 0)
    heard = found._heard[CYCLES]
    assert (len(heard.delivered), len(heard.missing)) == (1, 1)
