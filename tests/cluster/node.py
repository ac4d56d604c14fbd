"""The one node's components around the API server: controllers, scheduler, proxy, DNS and the kubelet."""

from __future__ import annotations

import json
from pathlib import Path

from cluster import containerd, network
from cluster.apiserver import ADMINISTRATORS, ApiServer
from cluster.builds import COMPONENTS, COREDNS, built
from cluster.places import NAME, keep
from cluster.processes import Daemon

NODE = "node"
CGROUPS = f"/{NAME}"


def controller_manager(state: Path, server: ApiServer) -> Daemon:
    return _component(
        "kube-controller-manager",
        state,
        f"--kubeconfig={server.kubeconfig('system:kube-controller-manager')}",
        f"--root-ca-file={server.authority.root.certificate}",
        f"--service-account-private-key-file={server.service_account_key.key}",
        "--use-service-account-credentials",
        "--leader-elect=false",
    )


def scheduler(state: Path, server: ApiServer) -> Daemon:
    kubeconfig = server.kubeconfig("system:kube-scheduler")
    return _component("kube-scheduler", state, f"--kubeconfig={kubeconfig}", "--leader-elect=false")


def proxy(state: Path, server: ApiServer) -> Daemon:
    return _component(
        "kube-proxy",
        state,
        f"--kubeconfig={server.kubeconfig('system:kube-proxy')}",
        f"--hostname-override={NODE}",
        "--proxy-mode=iptables",
        "--conntrack-max-per-core=0",  # the limit is the whole machine's: not ours to set
    )


def kubelet(state: Path, server: ApiServer) -> Daemon:
    configuration = keep(state / "kubelet.json", json.dumps(_kubelet_configuration(state, server), indent=2))
    return _component(
        "kubelet",
        state,
        f"--kubeconfig={server.kubeconfig(f'system:node:{NODE}', groups=['system:nodes'])}",
        f"--config={configuration}",
        f"--root-dir={state / 'kubelet'}",
        f"--cert-dir={state / 'kubelet'}",
        f"--hostname-override={NODE}",
        f"--node-ip={network.NODE_ADDRESS}",
    )


def dns(state: Path, server: ApiServer) -> Daemon:
    """On the node's address, where every pod reaches it: a Service would need an image and a pod first."""
    kubeconfig = server.kubeconfig("dns", groups=[ADMINISTRATORS])
    text = f"""\
.:53 {{
    bind {network.NODE_ADDRESS}
    errors
    kubernetes cluster.local {{
        kubeconfig {kubeconfig}
    }}
}}
"""
    corefile = keep(state / "Corefile", text)
    command = (*network.ENTER, str(built(COREDNS) / "coredns"), "-conf", str(corefile))
    return Daemon(name="coredns", command=command, folder=state)


def dns_serves() -> bool:
    """It listens only once it has read the cluster's services."""
    return network.accepts(network.NODE_ADDRESS, 53)


def _component(name: str, state: Path, *arguments: str) -> Daemon:
    return Daemon(name=name, command=(*network.ENTER, str(built(COMPONENTS) / name), *arguments), folder=state)


def _kubelet_configuration(state: Path, server: ApiServer) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(server.authority.root.certificate)},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{containerd.socket(state)}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": CGROUPS,
        "failCgroupV1": False,
        "failSwapOn": False,
        "clusterDNS": [network.NODE_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": "",  # pods know the cluster's names and no other
        "podLogsDir": str(state / "pod-logs"),
        "volumePluginDir": str(state / "volume-plugins"),
        # How full the machine's disk is says nothing about the tests; a lack of memory is theirs.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "200Mi"},
    }
