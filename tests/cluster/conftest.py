from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from cluster import images as sources
from cluster import seaweedfs
from cluster.choice import a_cluster
from cluster.cluster import Cluster
from cluster.release import Images, Release
from cluster.seaweedfs import SeaweedFS
from cluster.tenant import Tenant
from leyline.local import LocalStore
from runs import published_run

_NEEDS_IMAGES = "images"


@cache
def _built() -> dict[str, str]:
    """The images by target; once, so that all tests of a session run the same code."""
    return {target: sources.built(target) for target in sources.TARGETS}


def pytest_runtestloop(session: pytest.Session) -> None:
    """Builds before the first test and not in a fixture: it takes minutes, and a fixture's time is its test's."""
    if session.config.option.collectonly:
        return
    cluster = a_cluster()
    cluster.prepare()
    if any(_NEEDS_IMAGES in getattr(item, "fixturenames", ()) for item in session.items):
        names = _built().values()
        cluster.up()
        for name in names:
            cluster.publish(name)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster, brought up unless it is; `EMRAKUL_E2E_KEEP=1` leaves it up for the next run.

    There is one for all: `-n` of pytest-xdist is not for these tests.
    """
    cluster = a_cluster()
    cluster.up()
    yield cluster
    if os.environ.get("EMRAKUL_E2E_KEEP") != "1":
        cluster.down()


@pytest.fixture(scope="session")
def images(cluster: Cluster) -> Images:
    return Images(**{target: cluster.publish(name) for target, name in _built().items()})


@pytest.fixture(scope="session")
def store(cluster: Cluster, images: Images) -> Iterator[SeaweedFS]:
    with seaweedfs.deployed(cluster, images.weed) as store:
        yield store


@pytest.fixture(scope="session")
def installed(cluster: Cluster, images: Images, store: SeaweedFS) -> Release:
    """The operator of the whole cluster, for all tests.

    One of an earlier session goes: it remembers that session's runs, and would rightly refuse others in their place.
    """
    release = Release(cluster, images, "emrakul", "emrakul-system")
    release.install()
    release.kill()
    release.wait_ready()
    return release


@pytest.fixture
def release(installed: Release) -> Release:
    """The same, ready whatever a test before did to it."""
    installed.wait_ready()
    return installed


@pytest.fixture
def new_tenant(cluster: Cluster, store: SeaweedFS) -> Iterator[Callable[..., Tenant]]:
    """Makes namespaces with a run: a copy of `run`, or of one of the small model; all go in the end."""
    made: list[str] = []

    def make(prefix: str = "", *, run: LocalStore | None = None, masked: bool = False) -> Tenant:
        name = f"team-{uuid.uuid4().hex[:8]}"
        cluster.kubectl("create", "namespace", name)
        made.append(name)
        cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        tenant = Tenant(cluster, name, store.run(prefix or name))
        if run is None:
            published_run(tenant.store, masked=masked)
        else:
            for head in run.list(""):
                tenant.store.put_if_absent(head.key, run.get(head.key))
        tenant.apply(seaweedfs.secret("store"))
        return tenant

    yield make
    for name in made:
        cluster.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


@pytest.fixture
def tenant(new_tenant: Callable[..., Tenant], release: Release) -> Tenant:
    """One of the operator of all tests."""
    return new_tenant()
