"""Tamiyo's word counts at admission, and it can only hold back."""

from __future__ import annotations

import json

from api.apiclient import POLICIES
from api.stage import Stage, condition


def test_guidance_in_the_run_caps_the_stage(stage: Stage) -> None:
    stage.store.put_if_absent("guidance/0001.json", json.dumps({"max_stage": "ValidationOnly"}).encode())
    stage.begin()
    stage.policy()
    status = stage.reached("ValidatedOnly")
    assert status["stage"] == "ValidationOnly"
    assert condition(status, "Committed")["status"] == "False"


def test_guidance_that_loosens_a_constraint_is_refused(stage: Stage) -> None:
    stage.store.put_if_absent("guidance/0001.json", json.dumps({"accuracy_drop_threshold": 0.5}).encode())
    stage.begin()
    stage.policy()
    status = stage.wait(lambda: (s := stage.status("digits", kind=POLICIES)).get("message") and s)
    assert "guidance/0001.json sets accuracy_drop_threshold, a safety constraint" in status["message"]
    assert condition(status, "Ready")["status"] == "False"
    assert stage.cycles() == []

    stage.cycle("by-hand", policyRef={"name": "digits"})
    told = stage.reached("Failed", "by-hand")
    assert told["reason"] == "InvalidInput"
    assert "accuracy_drop_threshold" in told["message"]
    assert stage.errors() == []
