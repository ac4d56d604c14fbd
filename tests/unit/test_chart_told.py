"""What the chart tells people: alerts on what is measured, a test of the release, notes with a cycle to paste."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts import CHART, FULL, MODES, config_of, helm, needs_helm, of, only, render
from emrakul.api.manifest import load_manifest
from emrakul.cluster.metrics import Metrics


@needs_helm
def test_alerts_ask_for_what_is_measured() -> None:
    objects = render({"metrics": {"rules": {"enabled": True, "labels": {"release": "prometheus"}}}})
    rules = only(objects, "PrometheusRule")
    assert rules["metadata"]["labels"]["release"] == "prometheus"
    alerts = {alert["alert"]: alert["expr"] for group in rules["spec"]["groups"] for alert in group["rules"]}
    assert set(alerts) == {
        *("EmrakulAnalysesFail", "EmrakulHoldsTraining", "EmrakulTakesTrainingTime"),
        *("EmrakulAbsent", "EmrakulBreakerOpen", "EmrakulStoreReverted", "EmrakulCyclesFail"),
    }
    series = _series()
    for expression in alerts.values():
        for name, chosen in re.findall(r"(\w+)\{(.*?)\}", expression):
            wanted = dict(re.findall(r'(\w+)="(.*?)"', chosen))
            assert (wanted.pop("job"), wanted.pop("namespace")) == ("emrakul", "ops")
            assert name == "up" or any(wanted.items() <= one.items() for one in series[name]), (name, wanted)
    # a reverted store is a state that a cycle waits in, never its end: no cycle is counted for it
    assert re.findall(r"emrakul_\w+", alerts["EmrakulStoreReverted"]) == ["emrakul_store_errors_total"]
    service = only(objects, "Service")
    assert (service["metadata"]["name"], service["metadata"]["namespace"]) == ("emrakul", "ops")  # job and namespace


def _series() -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for family in Metrics().registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


@needs_helm
def test_the_monitor_finds_the_service() -> None:
    objects = render(FULL)
    monitor, service = only(objects, "ServiceMonitor"), only(objects, "Service")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"] == [{"port": "http", "path": "/metrics", "interval": "30s"}]
    template = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= template.items()
    assert not service["spec"]["selector"].items() <= only(objects, "Pod")["metadata"]["labels"].items()
    assert not of(render({}), "ServiceMonitor", "PrometheusRule")


@needs_helm
def test_helm_test_asks_the_service() -> None:
    (container,) = only(render({}), "Pod")["spec"]["containers"]
    assert container["image"] == "emrakul/operator:0.1.0"
    assert container["command"][-1] == "http://emrakul.ops:8080/health/emrakul"
    compile(container["command"][2], "test", "exec")


@pytest.fixture
def notes(tmp_path: Path) -> Any:
    """NOTES are only told by an install; here they are rendered as if they were an object."""
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    text = (chart / "templates" / "NOTES.txt").read_text()
    (chart / "templates" / "notes.yaml").write_text(
        f'{{{{- define "notes" }}}}{text}{{{{ end }}}}notes: {{{{ include "notes" . | toJson }}}}\n'
    )

    def told(given: dict[str, Any]) -> str:
        arguments = ("emrakul", str(chart), "--namespace=ops", "--show-only=templates/notes.yaml")
        done = helm("template", *arguments, given=given)
        assert done.returncode == 0, done.stderr
        text: str = yaml.safe_load(done.stdout)["notes"]
        return text

    return told


@needs_helm
def test_notes_warn_while_no_signature_is_required(notes: Any) -> None:
    assert "WARNING: no trust key is set" in notes({})
    only_operator = {"operatorKeys": {"trustSecret": "trust"}}
    assert "WARNING: operatorKeys.trustSecret is set, keys.trustSecret is not" in notes(only_operator)
    assert "WARNING" not in notes({**only_operator, "keys": {"trustSecret": "trust"}})


@needs_helm
@MODES
def test_notes_have_a_cycle_of_eight_lines_that_is_allowed(notes: Any, given: dict[str, Any]) -> None:
    text = notes(given)
    manifest = text.partition("<<END\n")[2].partition("END\n")[0]
    assert len(manifest.splitlines()) <= 8
    cycle, _ = load_manifest(manifest)
    config = config_of(render(given))
    assert (cycle.spec.operator_class or "") == config.operator_class
    if given:
        assert config.allows(str(cycle.metadata.namespace), str(cycle.spec.run))
    assert ("NOTHING STARTS YET" in text) == (not given)
    assert "CREATES PODS" in text
