"""Outcomes reach a sink at least once, and a dead sink is in nobody's way."""

from __future__ import annotations

from api.sinks import sink
from api.stage import Stage
from leyline import layout
from leyline.store import NotFound


def sent(stage: Stage, cycle: str) -> bool:
    try:
        stage.store.head(layout.sent(cycle))
    except NotFound:
        return False
    return True


def test_an_outcome_goes_out_as_a_cloud_event(stage: Stage) -> None:
    with sink() as received:
        stage.begin()
        stage.policy(sink=received.url)
        status = stage.reached("Committed")
        stage.wait(lambda: sent(stage, status["cycle"]))
        (event,) = received.events
        assert received.content == {"application/cloudevents+json; charset=utf-8"}
        assert event["specversion"] == "1.0"
        assert event["type"] == "dev.emrakul.cycle.ended.v1"
        assert (event["source"], event["subject"]) == (stage.run, status["cycle"])
        assert event["data"]["outcome"] == "Committed"
        # another operator finds the mark
        stage.operator.kill()
        stage.operator.start()
        stage.wait(lambda: (stage.operator.health() or {}).get("ready"))
        stage.cycle("later", policyRef={"name": "digits"})
        stage.wait(lambda: stage.status("later").get("outcome"))
        assert {one["id"] for one in received.events} == {event["id"]}
    assert "hidden" not in stage.operator.log.read_text()


def test_a_dead_sink_blocks_nobody_and_gets_it_after_a_restart(stage: Stage) -> None:
    with sink() as received:
        received.answer = 503
        stage.begin(sink=received.url)
        stage.policy()
        status = stage.reached("Committed")
        first = stage.wait(lambda: received.events and received.events[0])
        assert not sent(stage, status["cycle"])
        stage.operator.kill()
        received.answer = 200
        received.events.clear()
        stage.operator.start()
        stage.wait(lambda: sent(stage, status["cycle"]))
        assert {one["id"] for one in received.events} == {first["id"]}
