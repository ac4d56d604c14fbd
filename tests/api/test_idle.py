"""Nothing to do: nothing is done. Ten minutes of it, beside the other tests; and a watch that tells nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from api.apiclient import CYCLES, POLICIES
from api.operators import wait_for
from api.proxy import proxy
from api.stage import Stage

IDLE_SECONDS = 600.0
DEAF_SECONDS = 240.0
"""Two listings a minute apart, ninety seconds of patience, and a slow machine."""


@pytest.mark.timeout(900)
def test_an_idle_operator_writes_nothing_for_ten_minutes(stage: Stage) -> None:
    """With an ended cycle, a policy that waits for the trainer, and one that waits for its Secret."""
    with proxy(stage.server, stage.folder) as between:
        stage.kubeconfig = between.kubeconfig
        stage.begin()
        stage.policy()
        stage.reached("Committed")
        stage.policy("other", store={**stage.store_spec, "credentialsSecretRef": {"name": "none"}})
        wait_for(lambda: stage.status("other", kind=POLICIES))
        time.sleep(10)
        before = versions(stage)
        reads = len(between.asked)
        writes = between.writes
        time.sleep(IDLE_SECONDS)
        assert versions(stage) == before
        assert between.writes == writes
        assert stage.operator.process.poll() is None
        assert stage.operator.starts == 1
        print(f"{(len(between.asked) - reads) / (IDLE_SECONDS / 60):.1f} requests a minute")

        # and it has not gone deaf
        stage.cycle("later", policyRef={"name": "digits"})
        wait_for(lambda: stage.status("later").get("outcome"), seconds=20)
        assert stage.errors() == []
        stage.operator.kill()


def versions(stage: Stage) -> dict[str, str]:
    found = [*stage.api.list(CYCLES, stage.namespace), *stage.api.list(POLICIES, stage.namespace)]
    return {one["metadata"]["uid"]: one["metadata"]["resourceVersion"] for one in found}


@pytest.mark.timeout(500)
def test_a_watch_that_says_nothing_ends_the_operator(stage: Stage, tmp_path: Path) -> None:
    """The connection stands, and no byte comes: only the listing shows what was missed."""
    with proxy(stage.server, stage.folder) as between:
        stage.kubeconfig = between.kubeconfig
        stage.begin()
        stage.policy()
        stage.reached("Committed")
        between.mute = True
        began = time.monotonic()
        stage.cycle("unheard", policyRef={"name": "digits"})
        code = wait_for(lambda: stage.operator.process.poll(), seconds=DEAF_SECONDS)
        print(f"it ended after {time.monotonic() - began:.0f} s")
        assert code != 0
        assert "it does not hear any more" in stage.operator.log.read_text()
        between.mute = False
        stage.operator.start()
        wait_for(lambda: stage.status("unheard").get("outcome"))
