"""What the API server makes of our resources: the real one, with the real definitions."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.apiserver import ApiServer
from cluster.programs import CommandFailed
from emrakul.api.cycle import CycleStatus, PruningCycle
from emrakul.api.policy import PolicyStatus, PruningPolicy
from emrakul.settings import Settings
from filled import filled

ROOT = Path(__file__).parents[2]
MANIFESTS = Path(__file__).parent / "manifests"
API = "emrakul.dev/v1alpha1"

EIGHT_LINES = """\
apiVersion: emrakul.dev/v1alpha1
kind: PruningCycle
metadata:
  name: first
  namespace: {namespace}
spec:
  checkpoint: s3://bucket/runs/digits/checkpoints/4000-1-0f3a9b2c
"""


@pytest.fixture(scope="module")
def ours(server: ApiServer) -> ApiServer:
    """The server with our definitions, without a warning about them."""
    server.kubectl("apply", "--warnings-as-errors", f"--filename={ROOT / 'crds'}")
    server.kubectl("wait", "--for=condition=Established", "--timeout=60s", f"--filename={ROOT / 'crds'}")
    return server


@pytest.fixture(scope="module")
def namespace(ours: ApiServer) -> str:
    name = f"manifests-{uuid.uuid4().hex[:8]}"
    ours.kubectl("create", "namespace", name)
    return name


def cases(name: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text())]


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": API, "kind": kind, "metadata": {"name": f"a{uuid.uuid4().hex[:8]}"}, "spec": spec}


def create(ours: ApiServer, namespace: str, manifest: dict[str, Any]) -> dict[str, Any]:
    stored = ours.kubectl(
        "create", f"--namespace={namespace}", "--filename=-", "--output=json", input=json.dumps(manifest)
    )
    found: dict[str, Any] = json.loads(stored)
    return found


def is_understood(message: str) -> bool:
    """A person reads no regular expressions, and no rule that could not be evaluated."""
    return not any(sign in message for sign in ("should match", r"\d", "^(", "no such", "evaluating rule", "runtime"))


@pytest.mark.parametrize("kind", ["pruningcycles", "pruningpolicies"])
def test_a_definition_is_taken_as_structural(ours: ApiServer, kind: str) -> None:
    crd = json.loads(ours.kubectl("get", "crd", f"{kind}.emrakul.dev", "--output=json"))
    conditions = {one["type"]: one["status"] for one in crd["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


def test_names_are_found(ours: ApiServer, namespace: str) -> None:
    for name in ("prune", "prc", "prp", "emrakul", "pruningcycle"):
        ours.kubectl("get", name, f"--namespace={namespace}")


# --- what is taken ----------------------------------------------------------------------------------------------------


def test_eight_lines_are_a_cycle(ours: ApiServer, namespace: str) -> None:
    ours.kubectl("apply", "--filename=-", input=EIGHT_LINES.format(namespace=namespace))
    stored = json.loads(ours.kubectl("get", "prune", "first", f"--namespace={namespace}", "--output=json"))
    assert stored["spec"] == {
        "checkpoint": "s3://bucket/runs/digits/checkpoints/4000-1-0f3a9b2c",
        "suspend": False,
    }
    assert PruningCycle.model_validate(stored).spec.run == "s3://bucket/runs/digits"
    assert ours.kubectl("apply", "--filename=-", input=EIGHT_LINES.format(namespace=namespace)).endswith("unchanged\n")


def test_defaults_are_filled(ours: ApiServer, namespace: str) -> None:
    settings = {"structuredPruning": {"progressiveSchedule": {"promotionCycles": 2}}}
    spec = {"run": "s3://bucket/run", "settings": settings, "rollback": {"id": "r-1"}}
    stored = create(ours, namespace, resource("PruningPolicy", spec))["spec"]
    assert (stored["every"], stored["historyLimit"], stored["ttlSecondsAfterFinished"]) == (1, 20, 604_800)
    assert stored["guidance"] == {"hold": False, "rateFactor": "1"}
    assert stored["rollback"] == {"id": "r-1", "to": "last-good"}
    assert Settings.from_resource(stored["settings"], name="settings") == Settings.from_resource(settings, name="")
    assert "store" not in stored
    assert "podOverrides" not in stored


def test_what_is_kubernetes_own_is_kept_as_it_is(ours: ApiServer, namespace: str) -> None:
    overrides = {
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
        "resources": {"requests": {"cpu": 2, "memory": "1Gi"}},
        "securityContext": {"runAsUser": None, "fsGroup": 2000},
        "volumes": [{"name": "data", "csi": {"driver": "x", "volumeAttributes": {"a": "b"}}}],
    }
    spec = {"run": "s3://bucket/run", "podOverrides": overrides}
    stored = create(ours, namespace, resource("PruningPolicy", spec))
    assert stored["spec"]["podOverrides"] == overrides
    assert PruningPolicy.model_validate(stored).spec.pod_overrides.security_context == {
        "runAsUser": None,
        "fsGroup": 2000,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"validationTimeout": 90, "startupTimeout": "15m", "checkpointAnalysisTimeout": "300"},
        {"analysisMemoryLimit": "2gib", "validationMemoryLimit": 4_000_000_000},
        {"analysisMemoryLimit": "100000k", "validationMemoryLimit": "1.5TB"},
        {"workerScalingFormula": "max(4, ceil(num_params / (worker_calculation_rate * worker_time_budget)))"},
        {"workerCalculationRate": "auto"},
        {"workerCalculationRate": "auto", "workerScalingFormula": "2 * num_params / worker_calculation_rate"},
        {"safetyMargin": "0", "importance": ["michel", "taylor"], "structuredPruning": {"kinds": ["layer"]}},
        {"structuredPruning": {"progressiveSchedule": {"phase1Epochs": 0, "phase2StartEpoch": 1}}},
    ],
)
def test_settings_may_be_written_as_people_do(ours: ApiServer, namespace: str, settings: dict[str, Any]) -> None:
    stored = create(ours, namespace, resource("PruningPolicy", {"run": "s3://bucket/run", "settings": settings}))
    assert Settings.from_resource(stored["spec"]["settings"], name="settings") == Settings.from_resource(
        settings, name="settings"
    )


def examples() -> Iterator[Any]:
    for path in sorted((ROOT / "examples").glob("**/*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if isinstance(document, dict) and document.get("apiVersion") == API:
                yield pytest.param(document, id=f"{path.name}: {document['kind']}")


@pytest.mark.parametrize("document", list(examples()))
def test_the_examples_are_taken(ours: ApiServer, namespace: str, document: dict[str, Any]) -> None:
    spec = document["spec"]
    if spec.get("run", "s3:").startswith("./"):  # for `emrakul run` on one machine; all the rest is the same
        spec = {**spec, "run": "s3://bucket/run"}
    create(ours, namespace, resource(document["kind"], spec))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*cases("cycles"), *cases("policies")])
def test_a_mistake_is_refused_in_a_sentence(ours: ApiServer, namespace: str, case: dict[str, Any]) -> None:
    with pytest.raises(CommandFailed) as refusal:
        ours.kubectl(
            "create", "--dry-run=server", f"--namespace={namespace}", "--filename=-",
            f"--validate={case.get('validate', 'strict')}", input=json.dumps(case["manifest"]),
        )  # fmt: skip
    print(refusal.value.error)
    assert [words for words in case["says"] if words not in refusal.value.error.replace('\\"', '"')] == []
    assert is_understood(refusal.value.error)


@pytest.mark.parametrize("case", cases("changes"))
def test_a_change_is_taken_or_refused_in_a_sentence(ours: ApiServer, namespace: str, case: dict[str, Any]) -> None:
    before = create(ours, namespace, resource(case["kind"], case["before"]))
    after = json.dumps(resource(case["kind"], case["after"]) | {"metadata": {"name": before["metadata"]["name"]}})
    command = ("replace", f"--namespace={namespace}", "--filename=-")
    if "says" not in case:
        ours.kubectl(*command, input=after)
        return
    with pytest.raises(CommandFailed) as refusal:
        ours.kubectl(*command, input=after)
    print(refusal.value.error)
    assert [words for words in case["says"] if words not in refusal.value.error] == []
    assert is_understood(refusal.value.error)


# --- status -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "spec", "model"),
    [
        ("PruningCycle", {"checkpoint": "latest", "policyRef": {"name": "digits"}}, CycleStatus),
        ("PruningPolicy", {"run": "s3://bucket/run"}, PolicyStatus),
    ],
)
def test_every_field_of_a_status_survives(
    ours: ApiServer, namespace: str, kind: str, spec: dict[str, Any], model: type[CycleStatus | PolicyStatus]
) -> None:
    manifest = resource(kind, spec)
    create(ours, namespace, manifest)
    status = filled(model)
    written = {**manifest, "status": status.dump()}
    ours.kubectl(
        "apply", "--server-side", "--subresource=status", "--field-manager=emrakul-operator", "--filename=-",
        f"--namespace={namespace}", input=json.dumps(written),
    )  # fmt: skip
    stored = json.loads(
        ours.kubectl("get", kind, manifest["metadata"]["name"], f"--namespace={namespace}", "--output=json")
    )
    assert stored["status"] == written["status"]
    assert model.model_validate(stored["status"], by_alias=True, by_name=False) == status


def test_a_status_beside_the_spec_is_not_taken(ours: ApiServer, namespace: str) -> None:
    manifest = resource("PruningPolicy", {"run": "s3://bucket/run"})
    assert "status" not in create(ours, namespace, {**manifest, "status": {"stage": "Aggressive"}})


# --- what people see --------------------------------------------------------------------------------------------------


def test_the_columns_tell_a_cycles_story(ours: ApiServer, namespace: str) -> None:
    manifest = resource("PruningCycle", {"checkpoint": "latest", "policyRef": {"name": "digits"}})
    name = create(ours, namespace, manifest)["metadata"]["name"]
    status = {
        "run": "s3://bucket/runs/digits", "checkpoint": "4000-1-0f3a9b2c", "stage": "Moderate", "state": "Committed",
        "progress": "16/16 requests", "pruned": "10/10 channels", "accuracy": {"drop": "0.001"}, "message": "Well.",
    }  # fmt: skip
    patch = json.dumps({"status": status})
    command = ("patch", "prune", name, "--subresource=status", "--type=merge", f"--patch={patch}")
    ours.kubectl(*command, f"--namespace={namespace}")

    plain = ours.kubectl("get", "prune", name, f"--namespace={namespace}")
    wide = ours.kubectl("get", "prune", name, f"--namespace={namespace}", "--output=wide")
    print(wide)
    columns = ["NAME", "RUN", "CHECKPOINT", "STAGE", "STATE", "PROGRESS", "PRUNED", "DROP", "AGE"]
    assert plain.splitlines()[0].split() == columns
    assert wide.splitlines()[0].split() == [*columns, "MESSAGE"]
    assert "10/10 channels" in plain
    selected = ours.kubectl(
        "get", "prune", "--field-selector=status.state=Committed", f"--namespace={namespace}", "--output=name"
    )
    assert selected.split() == [f"pruningcycle.emrakul.dev/{name}"]


def test_a_policys_columns(ours: ApiServer, namespace: str) -> None:
    create(ours, namespace, resource("PruningPolicy", {"run": "s3://bucket/run"}))
    header = ours.kubectl("get", "prp", f"--namespace={namespace}", "--output=wide").splitlines()[0]
    assert header.split() == ["NAME", "RUN", "STAGE", "BREAKER", "LIVE", "TIP", "READY", "AGE", "MESSAGE"]


@pytest.mark.parametrize("path", ["pruningcycles.spec", "pruningcycles.status", "pruningpolicies.spec"])
def test_explain_has_something_to_say_of_everything(ours: ApiServer, path: str) -> None:
    told = ours.kubectl("explain", path)
    print(told)
    assert "<no description>" not in told
