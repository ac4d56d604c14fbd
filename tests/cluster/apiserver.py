"""etcd and kube-apiserver: alone on loopback they are the API tests' whole cluster, and on a node its heart."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import kubeconfigs
from cluster.builds import COMPONENTS, built
from cluster.certificates import Authority
from cluster.places import keep
from cluster.processes import Daemon
from cluster.programs import CommandFailed, output

ADMINISTRATORS = "system:masters"
_MEMBER = "tests"


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where the two listen. Clients are on the same machine, or in the same network namespace: see `enter`."""

    port: int
    etcd_port: int
    etcd_peer_port: int
    enter: tuple[str, ...] = ()  # the command that runs the one after it where these ports are
    hosts: tuple[str, ...] = ()  # more names and addresses that the certificate is good for
    flags: tuple[str, ...] = ()  # more of kube-apiserver's, stronger than those here


class ApiServer:
    """One API server with its etcd. Everything it has is in `folder`, so another process may take it over."""

    def __init__(self, folder: Path, listening: Listening) -> None:
        self.folder = folder
        self._listening = listening
        self._programs = built(COMPONENTS)
        self.authority = Authority(folder / "certificates")
        self.service_account_key = self.authority.signing_key("service-accounts")
        self.etcd = Daemon(name="etcd", command=(*listening.enter, *self._etcd_command()), folder=folder)
        self.kube_apiserver = Daemon(name="kube-apiserver", command=(*listening.enter, *self._command()), folder=folder)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._listening.port}"

    def start(self) -> None:
        """Starts what does not run, and waits until it serves."""
        self.start_etcd()
        self.start_kube_apiserver()

    def stop(self) -> None:
        self.stop_kube_apiserver()
        self.stop_etcd()

    def start_etcd(self) -> None:
        self.etcd.start()
        self.etcd.wait(self._etcd_serves, seconds=30)

    def stop_etcd(self) -> None:
        self.etcd.stop()

    def start_kube_apiserver(self) -> None:
        self.kube_apiserver.start()
        self.kube_apiserver.wait(self._serves, seconds=90)

    def stop_kube_apiserver(self, *, grace: float = 5) -> None:
        """With `grace` 0 it is killed like a machine that fails; else open watches get a few seconds to end."""
        self.kube_apiserver.stop(grace=grace)

    def restart_kube_apiserver(self, *, grace: float = 5) -> None:
        """The API server alone: what is stored stays, every watch is cut."""
        self.stop_kube_apiserver(grace=grace)
        self.start_kube_apiserver()

    def snapshot(self, path: Path) -> Path:
        """Everything that is stored now, as one file."""
        self._run("etcdctl", f"--endpoints={self._etcd_url}", "snapshot", "save", str(path))
        return path

    def restore(self, snapshot: Path, *, bump_revision: int | None = None) -> None:
        """Goes back to what `snapshot` holds, as after a disaster, and serves it.

        Without `bump_revision` resource versions are handed out twice, as administrators often do it. With it they go
        on that much higher and older ones are gone, so that every client must list anew, as etcd advises it.
        """
        self.stop()
        shutil.rmtree(self._data)
        forward = () if bump_revision is None else (f"--bump-revision={bump_revision}", "--mark-compacted")
        place = (f"--data-dir={self._data}", f"--name={_MEMBER}", *self._membership())
        self._run("etcdutl", "snapshot", "restore", str(snapshot), *place, *forward)
        self.start()

    @property
    def admin(self) -> Path:
        """The kubeconfig of a user who may do everything."""
        return self.kubeconfig("admin", groups=[ADMINISTRATORS])

    def kubeconfig(self, user: str, *, groups: Sequence[str] = (), namespace: str = "default") -> Path:
        """A kubeconfig for any user, who has what RBAC grants to the name and the groups and nothing else."""
        pair = self.authority.client(user, groups=groups)
        text = kubeconfigs.with_certificate(pair, server=self.url, root=self.authority.root_base64, namespace=namespace)
        return self._write_kubeconfig(f"{pair.certificate.stem}@{namespace}", text)

    def token(self, service_account: str, *, namespace: str, duration: str = "1h") -> str:
        """A token for a service account that exists."""
        return self.kubectl(
            "create", "token", service_account, f"--namespace={namespace}", f"--duration={duration}"
        ).strip()

    def service_account_kubeconfig(self, service_account: str, *, namespace: str) -> Path:
        """A kubeconfig for a service account that exists, with a new token in it."""
        token = self.token(service_account, namespace=namespace)
        text = kubeconfigs.with_token(token, server=self.url, root=self.authority.root_base64, namespace=namespace)
        return self._write_kubeconfig(f"{service_account}@{namespace}.token", text)

    def kubectl(
        self,
        *arguments: str,
        input: str | None = None,
        kubeconfig: Path | None = None,
        seconds: float = 120,
    ) -> str:
        """kubectl's output, as the administrator or with `kubeconfig`; CommandFailed when the server refuses."""
        chosen = f"--kubeconfig={kubeconfig or self.admin}"
        return self._run("kubectl", chosen, *arguments, input=input, seconds=seconds)

    def _run(self, program: str, *arguments: str, input: str | None = None, seconds: float = 120) -> str:
        command = (*self._listening.enter, str(self._programs / program), *arguments)
        discovered = {"KUBECACHEDIR": str(self.folder / "kubectl")}
        return output(*command, input=input, environment=discovered, seconds=seconds)

    def _write_kubeconfig(self, name: str, text: str) -> Path:
        path = self.folder / "kubeconfigs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o600)
        return keep(path, text)

    def _serves(self) -> bool:
        try:
            self.kubectl("get", "--raw=/readyz", "--request-timeout=2s")
            self.kubectl(
                "get", "namespace", "default", "--request-timeout=2s"
            )  # made soon after, and tests count on it
        except CommandFailed:
            return False
        return True

    def _etcd_serves(self) -> bool:
        try:
            self._run("etcdctl", f"--endpoints={self._etcd_url}", "--command-timeout=2s", "endpoint", "health")
        except CommandFailed:
            return False
        return True

    @property
    def _data(self) -> Path:
        return self.folder / "etcd"

    @property
    def _etcd_url(self) -> str:
        return f"http://127.0.0.1:{self._listening.etcd_port}"

    def _membership(self) -> tuple[str, ...]:
        peer = f"http://127.0.0.1:{self._listening.etcd_peer_port}"
        return (f"--initial-cluster={_MEMBER}={peer}", f"--initial-advertise-peer-urls={peer}")

    def _etcd_command(self) -> tuple[str, ...]:
        peer = f"http://127.0.0.1:{self._listening.etcd_peer_port}"
        return (
            str(self._programs / "etcd"),
            f"--name={_MEMBER}",
            f"--data-dir={self._data}",
            f"--listen-client-urls={self._etcd_url}",
            f"--advertise-client-urls={self._etcd_url}",
            f"--listen-peer-urls={peer}",
            *self._membership(),
            "--unsafe-no-fsync",  # a test's data need not outlive the machine
            "--log-level=warn",
        )

    def _command(self) -> tuple[str, ...]:
        hosts = ("localhost", "127.0.0.1", "kubernetes.default.svc", *self._listening.hosts)
        serving = self.authority.server("kube-apiserver", hosts=hosts)
        kubelet_client = self.authority.client("kube-apiserver-kubelet-client", groups=[ADMINISTRATORS])
        return (
            str(self._programs / "kube-apiserver"),
            f"--secure-port={self._listening.port}",
            f"--etcd-servers={self._etcd_url}",
            f"--tls-cert-file={serving.certificate}",
            f"--tls-private-key-file={serving.key}",
            f"--client-ca-file={self.authority.root.certificate}",
            f"--kubelet-client-certificate={kubelet_client.certificate}",
            f"--kubelet-client-key={kubelet_client.key}",
            f"--service-account-key-file={self.service_account_key.certificate}",
            f"--service-account-signing-key-file={self.service_account_key.key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=Node,RBAC",
            # as managed clusters have it: an owner reference that blocks deletion needs the right to finalize the owner
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
            *self._listening.flags,
        )
