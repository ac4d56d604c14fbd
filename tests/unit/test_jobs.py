"""The Job of a launch: what the Job controller is told, and what a worker's pod is and is given."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs as make
from emrakul.api import labels
from emrakul.api.policy import KeyRef, SecretRef, StoreSpec
from emrakul.core.snapshot import Phase
from emrakul.invalid import Invalid
from emrakul.runtime.overrides import layered
from emrakul.settings import Settings
from leyline import exits

PHASES = list(Phase)


def env_of(made: make.Body) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in make.container_of(made)["env"]}


def mounts_of(made: make.Body) -> dict[str, make.Body]:
    """Volumes by where they are mounted."""
    volumes = {volume["name"]: volume for volume in make.pod_of(made)["volumes"]}
    return {mount["mountPath"]: volumes[mount["name"]] for mount in make.container_of(made)["volumeMounts"]}


class TestWhatTheJobControllerIsTold:
    @pytest.mark.parametrize("workers", [1, 7])
    @pytest.mark.parametrize("phase", [Phase.ANALYSE, Phase.APPLY])
    def test_each_worker_has_an_index_and_its_own_retries(self, phase: Phase, workers: int) -> None:
        spec = make.job(phase, workers=workers)["spec"]
        assert spec["completionMode"] == "Indexed"
        assert (spec["completions"], spec["parallelism"]) == (workers, workers)
        assert spec["backoffLimitPerIndex"] == 2
        assert "backoffLimit" not in spec and "maxFailedIndexes" not in spec

    @pytest.mark.parametrize("made", [make.job(Phase.VALIDATE), make.recheck()])
    def test_the_validator_is_alone(self, made: make.Body) -> None:
        spec = made["spec"]
        assert spec["backoffLimit"] == 2
        assert not {"completionMode", "completions", "parallelism", "backoffLimitPerIndex"} & spec.keys()

    def test_disruptions_are_ignored_bad_input_ends_all_and_who_gave_up_is_not_tried_again(self) -> None:
        disruption, bad, gave_up = make.job()["spec"]["podFailurePolicy"]["rules"]
        assert disruption == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        assert (bad["action"], bad["onExitCodes"]["values"]) == ("FailJob", [exits.BAD_INPUT, exits.KEY])
        assert (gave_up["action"], gave_up["onExitCodes"]["values"]) == ("FailIndex", [exits.GAVE_UP])
        assert bad["onExitCodes"]["containerName"] == "worker"

    def test_a_job_without_indices_has_none_to_fail(self) -> None:
        actions = [rule["action"] for rule in make.job(Phase.VALIDATE)["spec"]["podFailurePolicy"]["rules"]]
        assert actions == ["Ignore", "FailJob"]

    @pytest.mark.parametrize(("phase", "seconds"), [(Phase.ANALYSE, 960), (Phase.APPLY, 960), (Phase.VALIDATE, 720)])
    def test_the_deadline_lies_behind_every_limit_of_the_core(self, phase: Phase, seconds: int) -> None:
        assert make.job(phase)["spec"]["activeDeadlineSeconds"] == seconds

    @pytest.mark.parametrize("phase", PHASES)
    def test_a_pod_is_replaced_once_it_has_ended_and_the_job_stays_until_it_is_deleted(self, phase: Phase) -> None:
        spec = make.job(phase)["spec"]
        assert spec["podReplacementPolicy"] == "Failed"
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        assert "ttlSecondsAfterFinished" not in spec

    def test_only_a_job_of_a_queue_is_made_suspended(self) -> None:
        queued = make.job(queue="gpus")
        assert queued["spec"]["suspend"] is True
        assert queued["metadata"]["labels"][labels.QUEUE] == "gpus"
        assert "suspend" not in make.job()["spec"]
        assert labels.QUEUE not in make.job()["metadata"]["labels"]

    def test_the_cycle_owns_its_jobs_and_waits_for_none_of_them(self) -> None:
        (reference,) = make.job()["metadata"]["ownerReferences"]
        assert reference == {
            "apiVersion": "emrakul.dev/v1alpha1",
            "kind": "PruningCycle",
            "name": "digits",
            "uid": make.UID,
            "controller": True,
            "blockOwnerDeletion": False,
        }

    def test_job_and_pods_say_whose_they_are_and_what_for(self) -> None:
        made = make.job(Phase.APPLY, step=12, launch=3, config=make.config(operatorClass="blue"))
        expected = {
            "app.kubernetes.io/managed-by": "emrakul",
            "emrakul.dev/cycle": "digits",
            "emrakul.dev/cycle-uid": make.UID,
            "emrakul.dev/operator-class": "blue",
            "emrakul.dev/phase": "apply",
            "emrakul.dev/step": "12",
            "emrakul.dev/launch": "3",
        }
        assert made["metadata"]["labels"] == expected
        assert made["spec"]["template"]["metadata"]["labels"] == expected

    def test_a_recheck_is_the_policys(self) -> None:
        made = make.recheck()
        assert made["metadata"]["name"] == "digits-policy-r7-0"
        assert made["metadata"]["ownerReferences"][0]["kind"] == "PruningPolicy"
        assert made["metadata"]["labels"][labels.POLICY_UID] == make.UID
        assert labels.CYCLE_UID not in made["metadata"]["labels"]
        assert made["metadata"]["labels"][labels.PHASE] == "recheck"

    @pytest.mark.parametrize("phase", PHASES)
    def test_the_same_launch_is_the_same_job(self, phase: Phase) -> None:
        assert make.job(phase) == make.job(phase)


LENGTHS = st.one_of(st.integers(1, 63), st.integers(45, 63))
NAMES = LENGTHS.flatmap(lambda n: st.text("az09-", min_size=n, max_size=n)).map(lambda text: f"a{text[2:]}z"[:63])
LAUNCHES = st.tuples(st.sampled_from(PHASES), st.integers(0, 10**9 - 1), st.integers(0, 999))


class TestNames:
    def test_in_short(self) -> None:
        names = [make.job(phase, step=4, launch=1)["metadata"]["name"] for phase in PHASES]
        assert names == ["digits-a4-1", "digits-w4-1", "digits-v4-1"]

    @given(NAMES, LAUNCHES)
    def test_a_pods_host_name_fits(self, cycle: str, launch: tuple[Phase, int, int]) -> None:
        phase, step, number = launch
        made = make.job(phase, step=step, launch=number, owner=make.owner(cycle))
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", f"{made['metadata']['name']}-99999")
        assert len(f"{made['metadata']['name']}-99999") <= 63

    @given(NAMES, LAUNCHES, LAUNCHES)
    def test_two_launches_of_a_cycle_never_share_a_name(
        self, cycle: str, one: tuple[Phase, int, int], other: tuple[Phase, int, int]
    ) -> None:
        names = {
            make.job(phase, step=step, launch=launch, owner=make.owner(cycle))["metadata"]["name"]
            for phase, step, launch in (one, other)
        }
        assert len(names) == len({one, other})

    @given(st.sets(st.from_regex(r"[a-z0-9]([-a-z0-9]{0,39}[a-z0-9])?", fullmatch=True), min_size=2, max_size=2))
    def test_nor_do_two_cycles(self, cycles: set[str]) -> None:
        assert len({make.job(owner=make.owner(cycle))["metadata"]["name"] for cycle in cycles}) == 2


class TestWhatAWorkerRuns:
    def test_the_commands_are_those_of_one_machine_with_the_index_for_the_worker(self) -> None:
        container = make.container_of(make.job(step=1, launch=2, workers=7))
        said = "-m elesh --cycle s3://bucket/run/cycles/c2-0123456789 --launch 2 --round 1"
        assert container["command"] == ["python"]
        assert container["args"] == [*said.split(), "--worker", "$(JOB_COMPLETION_INDEX)", "--of", "7"]

    def test_the_index_is_the_controllers_to_set(self) -> None:
        assert "JOB_COMPLETION_INDEX" not in env_of(make.job())

    def test_the_validator_runs_in_its_own_image(self) -> None:
        container = make.container_of(make.job(Phase.VALIDATE, step=2))
        assert container["image"] == make.IMAGES["validator"]
        assert container["args"][:2] == ["-m", "urabrask"]
        assert make.container_of(make.job(Phase.APPLY))["image"] == make.IMAGES["worker"]

    def test_a_recheck_names_run_and_record(self) -> None:
        container = make.container_of(make.recheck())
        assert container["image"] == make.IMAGES["validator"]
        assert container["args"] == ["-m", "urabrask", "--run", "s3://bucket/run", "--record", "7"]

    def test_memory_is_the_settings_and_cpu_the_threads(self) -> None:
        settings = Settings(importance_aggregation_threads=3)
        analyse, apply = (make.container_of(make.job(phase, settings=settings)) for phase in PHASES[:2])
        assert analyse["resources"] == {
            "limits": {"memory": "2000000000"},
            "requests": {"memory": "2000000000", "cpu": "3"},
        }
        assert apply["resources"]["requests"]["cpu"] == "1"

    def test_libraries_start_threads_only_in_the_validator(self) -> None:
        assert [env_of(make.job(phase)).get("OMP_NUM_THREADS") for phase in PHASES] == ["1", "1", None]

    def test_the_last_words_of_a_worker_are_kept_in_its_status(self) -> None:
        assert make.container_of(make.job())["terminationMessagePolicy"] == "FallbackToLogsOnError"


class TestRestricted:
    @pytest.mark.parametrize("made", [*(make.job(phase) for phase in PHASES), make.recheck()])
    def test_every_pod_is(self, made: make.Body) -> None:
        pod, container = make.pod_of(made), make.container_of(made)
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert list(mounts_of(made)) == ["/tmp"]

    def test_who_changes_a_job_loosens_no_other(self) -> None:
        make.container_of(make.job())["securityContext"].clear()
        make.container_of(make.job())["volumeMounts"].clear()
        make.pod_of(make.job())["volumes"][0].clear()
        self.test_every_pod_is(make.job())

    def test_a_null_leaves_the_user_to_the_cluster(self) -> None:
        extra = make.overrides(securityContext={"runAsUser": None, "fsGroup": None})
        context = make.pod_of(make.job(overrides=extra))["securityContext"]
        assert "runAsUser" not in context and "fsGroup" not in context
        assert context["runAsNonRoot"] is True

    def test_another_user_may_be_named_and_what_is_so_anyway_may_be_said(self) -> None:
        extra = make.overrides(securityContext={"runAsUser": 1000, "runAsNonRoot": True})
        assert make.pod_of(make.job(overrides=extra))["securityContext"]["runAsUser"] == 1000

    @pytest.mark.parametrize(
        "context",
        [
            {"runAsUser": 0},
            {"runAsNonRoot": False},
            {"runAsNonRoot": None},
            {"seccompProfile": {"type": "Unconfined"}},
            {"seccompProfile": None},
            {"readOnlyRootFilesystem": False},
            {"allowPrivilegeEscalation": True},
            {"capabilities": {"add": ["SYS_ADMIN"]}},
            {"privileged": True},
            {"appArmorProfile": {"type": "Unconfined"}},
            {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]},
            {"windowsOptions": {"hostProcess": True}},
        ],
    )
    def test_nobody_loosens_it(self, context: dict[str, Any]) -> None:
        with pytest.raises(Invalid, match=rf"podOverrides\.securityContext\.{next(iter(context))}"):
            make.job(overrides=make.overrides(securityContext=context))

    @pytest.mark.parametrize("kind", ["hostPath", "nfs", "iscsi", "image"])
    def test_nor_mounts_what_is_not_the_namespaces(self, kind: str) -> None:
        volume = {"name": "node", kind: {"path": "/"}}
        with pytest.raises(Invalid, match=rf"node is of kind {kind}"):
            make.job(overrides=make.overrides(volumes=[volume]))

    @pytest.mark.parametrize(
        "token", [{}, {"audience": ""}, {"audience": "https://kubernetes.default.svc.cluster.local"}]
    )
    def test_nor_gets_a_token_of_the_api_server(self, token: dict[str, Any]) -> None:
        def mounted(token: dict[str, Any]) -> make.Body:
            sources = [{"configMap": {"name": "ca"}}, {"serviceAccountToken": {"path": "token", **token}}]
            volume = {"name": "cloud", "projected": {"sources": sources}}
            return make.job(overrides=make.overrides(volumes=[volume]))

        with pytest.raises(Invalid, match="cloud has a serviceAccountToken for the API server; name the audience"):
            mounted(token)
        assert mounted({"audience": "sts.amazonaws.com"})

    def test_the_charts_overrides_are_held_to_it_too(self) -> None:
        config = make.config(workers={"podOverrides": {"securityContext": {"runAsUser": 0}}})
        with pytest.raises(Invalid, match="runAsUser is 0"):
            make.job(config=config)


class TestStore:
    def test_without_a_secret_the_service_account_is_the_identity(self) -> None:
        made = make.job(config=make.config(workers={"serviceAccountName": "emrakul-worker"}))
        assert make.pod_of(made)["serviceAccountName"] == "emrakul-worker"
        assert not [name for name in env_of(made) if name.startswith("AWS_")]

    def test_endpoint_and_region(self) -> None:
        env = env_of(make.job(store=StoreSpec(endpoint="https://s3.example.org", region="eu-1")))
        assert env["AWS_ENDPOINT_URL_S3"] == "https://s3.example.org"
        assert env["AWS_REGION"] == "eu-1"

    def test_credentials_are_named_and_never_written_out(self) -> None:
        env = env_of(make.job(store=StoreSpec(credentials_secret_ref=SecretRef(name="s3"))))
        assert env["AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "s3", "key": "AWS_ACCESS_KEY_ID"}}
        assert env["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY"}}
        token = env["AWS_SESSION_TOKEN"]["secretKeyRef"]
        assert token == {"name": "s3", "key": "AWS_SESSION_TOKEN", "optional": True}

    def test_workers_have_credentials_of_their_own_where_they_are_given(self) -> None:
        both = StoreSpec(
            credentials_secret_ref=SecretRef(name="full"), worker_credentials_secret_ref=SecretRef(name="workers")
        )
        for made in (*(make.job(phase, store=both) for phase in PHASES), make.recheck(store=both)):
            assert "'full'" not in repr(made)
            assert env_of(made)["AWS_ACCESS_KEY_ID"]["secretKeyRef"]["name"] == "workers"

    def test_a_ca_of_ones_own(self) -> None:
        made = make.job(store=StoreSpec(ca_bundle_ref=KeyRef(name="ca", key="bundle.pem")))
        assert env_of(made)["AWS_CA_BUNDLE"] == "/etc/emrakul/ca/ca.crt"
        assert mounts_of(made)["/etc/emrakul/ca"]["secret"] == {
            "secretName": "ca",
            "items": [{"key": "bundle.pem", "path": "ca.crt"}],
        }


class TestKeys:
    KEYS = make.config(keys={"trustSecret": "trust", "signingKeySecret": "sign", "dataKeySecret": "data"})

    def made(self) -> dict[str, make.Body]:
        jobs = {phase.value: make.job(phase, config=self.KEYS) for phase in PHASES}
        return {**jobs, "recheck": make.recheck(config=self.KEYS)}

    def test_all_know_whom_to_trust(self) -> None:
        for made in self.made().values():
            assert env_of(made)["EMRAKUL_TRUST"] == "/etc/emrakul/trust"
            assert mounts_of(made)["/etc/emrakul/trust"]["secret"] == {"secretName": "trust"}

    def test_only_the_validator_of_a_cycle_signs(self) -> None:
        signing = {name: env_of(made).get("EMRAKUL_SIGNING_KEY") for name, made in self.made().items()}
        path = "/etc/emrakul/signing/signing.pem"
        assert signing == {"analyse": None, "apply": None, "validate": path, "recheck": None}
        assert [name for name, made in self.made().items() if "'sign'" in repr(made)] == ["validate"]

    def test_only_analysis_decrypts(self) -> None:
        assert env_of(self.made()["analyse"])["EMRAKUL_DATA_KEY"] == "/etc/emrakul/data/data.key"
        assert [name for name, made in self.made().items() if "'data'" in repr(made)] == ["analyse"]

    def test_they_are_mounted_read_only(self) -> None:
        mounts = make.container_of(self.made()["analyse"])["volumeMounts"]
        assert [mount["mountPath"] for mount in mounts if not mount.get("readOnly")] == ["/tmp"]


class TestOverrides:
    def test_everything_of_a_pod_that_may_be_chosen(self) -> None:
        extra = make.overrides(
            tolerations=[{"key": "gpu", "operator": "Exists"}],
            nodeSelector={"disk": "fast"},
            affinity={"nodeAffinity": {}},
            topologySpreadConstraints=[{"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}],
            labels={"team": "vision"},
            annotations={"sidecar.istio.io/inject": "false"},
            serviceAccountName="mine",
            imagePullSecrets=[{"name": "registry"}],
            env=[{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
            volumes=[{"name": "extra", "configMap": {"name": "extra"}}],
            volumeMounts=[{"name": "extra", "mountPath": "/extra"}],
            priorityClassName="low",
            runtimeClassName="gvisor",
        )
        made = make.job(overrides=extra)
        pod = make.pod_of(made)
        assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
        assert pod["nodeSelector"] == {"disk": "fast"}
        assert pod["affinity"] == {"nodeAffinity": {}}
        assert pod["topologySpreadConstraints"][0]["topologyKey"] == "zone"
        assert pod["serviceAccountName"] == "mine"
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert (pod["priorityClassName"], pod["runtimeClassName"]) == ("low", "gvisor")
        assert env_of(made)["HTTPS_PROXY"] == "http://proxy:3128"
        assert mounts_of(made)["/extra"]["configMap"] == {"name": "extra"}
        metadata = made["spec"]["template"]["metadata"]
        assert (metadata["labels"]["team"], metadata["annotations"]) == ("vision", {"sidecar.istio.io/inject": "false"})

    def test_a_policys_lie_over_the_charts(self) -> None:
        chart = {
            "serviceAccountName": "chart",
            "nodeSelector": {"pool": "chart", "disk": "fast"},
            "tolerations": [{"key": "a"}],
            "env": [{"name": "A", "value": "chart"}, {"name": "B", "value": "chart"}],
            "resources": {"requests": {"cpu": "4"}, "limits": {"example.com/gpu": "1"}},
            "priorityClassName": "chart",
        }
        policy = make.overrides(
            nodeSelector={"pool": "policy"},
            tolerations=[{"key": "a"}, {"key": "b"}],
            env=[{"name": "B", "value": "policy"}],
            resources={"requests": {"cpu": "8"}},
            priorityClassName="policy",
        )
        made = make.job(config=make.config(workers={"podOverrides": chart}), overrides=policy)
        pod = make.pod_of(made)
        assert pod["serviceAccountName"] == "chart"
        assert pod["nodeSelector"] == {"pool": "policy", "disk": "fast"}
        assert pod["tolerations"] == [{"key": "a"}, {"key": "b"}]
        assert pod["priorityClassName"] == "policy"
        assert (env_of(made)["A"], env_of(made)["B"]) == ("chart", "policy")
        resources = make.container_of(made)["resources"]
        assert resources["requests"]["cpu"] == "8"
        assert resources["limits"]["example.com/gpu"] == "1"

    def test_a_policy_that_says_nothing_takes_nothing_away(self) -> None:
        chart = make.overrides(
            serviceAccountName="chart", nodeSelector={"a": "b"}, resources={"requests": {"cpu": "4"}}
        )
        silent = make.overrides(**make.overrides().dump(), serviceAccountName=None, resources=None)
        merged = layered(chart, silent)
        assert (merged.service_account_name, merged.node_selector) == ("chart", {"a": "b"})
        assert merged.resources == {"limits": {}, "requests": {"cpu": "4"}}

    def test_ours_win_where_we_set_something(self) -> None:
        extra = make.overrides(
            labels={labels.CYCLE_UID: "another", "team": "vision"},
            env=[{"name": "AWS_REGION", "value": "elsewhere"}, {"name": "OMP_NUM_THREADS", "value": "64"}],
        )
        made = make.job(overrides=extra, store=StoreSpec(region="eu-1"))
        assert made["spec"]["template"]["metadata"]["labels"][labels.CYCLE_UID] == make.UID
        assert (env_of(made)["AWS_REGION"], env_of(made)["OMP_NUM_THREADS"]) == ("eu-1", "1")
        names = [one["name"] for one in make.container_of(made)["env"]]
        assert len(names) == len(set(names))

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"env": [{"name": "JOB_COMPLETION_INDEX", "value": "0"}]}, "tells workers apart"),
            ({"volumes": [{"name": "emrakul-trust", "emptyDir": {}}]}, "rename emrakul-trust"),
            ({"volumeMounts": [{"name": "x", "mountPath": "/tmp"}]}, "mount it elsewhere"),
            ({"volumeMounts": [{"name": "x", "mountPath": "/etc/emrakul"}]}, "mount it elsewhere"),
            ({"volumeMounts": [{"name": "x", "mountPath": "/etc/emrakul/trust/"}]}, "mount it elsewhere"),
            ({"volumeMounts": [{"name": "x", "mountPath": "/opt/../etc/emrakul/trust"}]}, "mount it elsewhere"),
            ({"resources": {"limits": {"memory": "64M"}}}, "settings.analysisMemoryLimit"),
            ({"resources": {"claims": [{"name": "gpu"}]}}, "resources.claims"),
            ({"resources": {"limits": "lots"}}, "resources.limits"),
        ],
    )
    def test_what_is_ours_cannot_be_taken(self, values: dict[str, Any], said: str) -> None:
        with pytest.raises(Invalid, match=said):
            layered(make.overrides(**values))
