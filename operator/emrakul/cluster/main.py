"""Puts the operator together and runs it until it is told to stop, or until a part of it ends: then all of it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

import kopf

from emrakul.api import labels
from emrakul.cluster import handlers
from emrakul.cluster.access import NotReady, Runs
from emrakul.cluster.cycle import CycleReconciler
from emrakul.cluster.ended import EndedCycles
from emrakul.cluster.freshness import Freshness
from emrakul.cluster.health import Health, HealthServer
from emrakul.cluster.kube import CYCLES, JOBS, POLICIES, Forbidden, Kind, Kube, KubeError, Unavailable
from emrakul.cluster.metrics import Metrics
from emrakul.cluster.orphans import Orphans
from emrakul.cluster.policy import PolicyReconciler
from emrakul.cluster.services import CYCLE, POLICY, Services
from emrakul.cluster.sink import Sinks
from emrakul.cluster.source import Sources
from emrakul.cluster.supervisor import WORKERS, Key, Supervisor
from emrakul.cluster.telling import Teller
from emrakul.runtime.config import OperatorConfig
from leyline.store import StoreError

log = logging.getLogger("emrakul")

LISTING_SECONDS = 60.0
PATIENCE_SECONDS = 20.0
"""How long a namespace that may not be read is asked for at the start."""
WATCHED: tuple[tuple[Kind, str], ...] = (
    (CYCLES, ""),
    (POLICIES, ""),
    (JOBS, f"{labels.MANAGED_BY}={labels.EMRAKUL}"),
)


_METRIC = {CYCLE: "cycle", POLICY: "policy"}


class Ended(Exception):
    """Why the operator cannot go on; whoever started it starts it again."""


async def operate(config: OperatorConfig) -> None:
    """Run until SIGTERM. Ended says what did not hold."""
    # a reconciler waits in a thread for its store; the default would be six of them on two cores
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2 * WORKERS, thread_name_prefix="emrakul"))
    metrics = Metrics()
    health = Health(metrics, operator_class=config.operator_class)
    kube = await Kube.connect(asked=metrics.api_request)
    freshness = Freshness()
    server = HealthServer(health, port=config.health_port)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(kube.close)
        runs = Runs(kube, config)
        stack.callback(runs.close)
        port = await server.start()
        stack.push_async_callback(server.stop)
        sinks = await stack.enter_async_context(Sinks(metrics))
        log.info("health and metrics are served on port %d", port)
        config = await _readable(kube, config, health)
        supervisor = Supervisor(lambda key: reconcile(key), expected=(KubeError, StoreError, NotReady))
        services = Services(
            kube=kube,
            config=config,
            runs=runs,
            metrics=metrics,
            health=health,
            sinks=sinks,
            wake=supervisor.wake,
        )
        orphans = Orphans(services)
        teller = Teller(services)
        sources = Sources(services)
        ended = EndedCycles(services, teller, sources)
        cycles = CycleReconciler(services, orphans, sources, teller, ended)
        policies = PolicyReconciler(services, orphans, ended)

        async def reconcile(key: Key) -> float | None:
            began = time.monotonic()
            try:
                return await (cycles.reconcile(key) if key.kind == CYCLE else policies.reconcile(key))
            finally:
                metrics.reconciled(_METRIC[key.kind], time.monotonic() - began)

        def wake(key: Key) -> None:
            health.heard()
            supervisor.wake(key)

        await _list(kube, config, freshness, wake=supervisor.wake)
        health.listed()
        running = asyncio.create_task(supervisor.run(), name="supervisor")
        health.supervisor = running
        nobody: Any = "emrakul"  # left out, kopf asks for the user's name, and a pod's user has none
        watch = kopf.operator(
            identity=nobody,
            registry=handlers.registry(wake, freshness, config.namespaces),
            settings=handlers.settings(),
            standalone=True,
            clusterwide=not config.namespaces,
            namespaces=config.namespaces,
        )
        await _first(
            {
                "watch": asyncio.create_task(watch, name="watch"),
                "supervisor": running,
                "listing": asyncio.create_task(_listen(kube, config, freshness, health), name="listing"),
            }
        )


async def _first(tasks: dict[str, asyncio.Task[None]]) -> None:
    """Until the watch was told to stop; what else ends first was not meant to."""
    try:
        await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        for name, task in tasks.items():
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise Ended(f"the {name} ended: {error or type(error).__name__}") from error
            if task.done() and name != "watch":
                raise Ended(f"the {name} ended, which it never should")
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def _listen(kube: Kube, config: OperatorConfig, freshness: Freshness, health: Health) -> None:
    """Each minute: does the watch tell what a listing shows? Ends with the sentence of why it does not."""
    while True:
        await asyncio.sleep(LISTING_SECONDS)
        try:
            await _list(kube, config, freshness)
            back = [name for name in health.left_out if await _is_readable(kube, name)]
        except Unavailable as error:  # an API server that restarts is not a watch that is deaf
            log.info("%s", error)
            continue
        except Ended as error:
            health.deaf = str(error)
            raise
        if back:
            raise Ended(f"namespace {back[0]} can be read now; the next start watches it")


async def _readable(kube: Kube, config: OperatorConfig, health: Health) -> OperatorConfig:
    """Without namespaces whose Role is gone, as after their deletion: one tenant's end must not be everybody's.

    An API server that was just started forbids everything to everybody for a moment, so each is asked for a while.
    """
    found = list(config.namespaces)
    end = time.monotonic() + PATIENCE_SECONDS
    while left := [name for name in found if not await _is_readable(kube, name)]:
        if time.monotonic() > end:
            found = [name for name in found if name not in left]
            break
        await asyncio.sleep(1)
    health.left_out = tuple(name for name in config.namespaces if name not in found)
    if health.left_out:
        log.warning(
            "left out, as this account may not read them: %s; granted later, they are watched",
            ", ".join(health.left_out),
        )
    if config.namespaces and not found:
        raise Ended(f"none of the namespaces {', '.join(config.namespaces)} can be listed; may this account do it?")
    return config.model_copy(update={"namespaces": tuple(found)})


async def _is_readable(kube: Kube, namespace: str) -> bool:
    try:
        await kube.list(CYCLES, namespace, metadata=True)
    except Forbidden:
        return False
    return True


async def _list(kube: Kube, config: OperatorConfig, freshness: Freshness, *, wake: Any = None) -> None:
    """All that is watched, live. Ended if it is not what the watch has told."""
    for kind, selector in WATCHED:
        for namespace in config.namespaces or (None,):
            watched = handlers.watch_name(kind.plural, namespace)
            known = freshness.known(watched)
            try:
                found = await kube.list(kind, namespace, labels=selector, metadata=True)
            except KubeError as error:
                if wake is not None:
                    raise Ended(
                        f"{kind.plural} cannot be listed ({error}); are the CRDs installed (crds.enabled in the "
                        "chart), and may this service account list them?"
                    ) from error
                if not isinstance(error, Forbidden):
                    raise
                log.info("%s", error)  # a namespace that went, and its Role with it: the others are looked at
                continue
            versions = {one["metadata"]["uid"]: one["metadata"]["resourceVersion"] for one in found.items}
            if deaf := freshness.listed(watched, found.version, versions, time.monotonic(), known=known):
                raise Ended(deaf)
            if wake is not None:
                for one in found.items:
                    for key in handlers.keys(kind.plural, one):
                        wake(key)


def run(config: OperatorConfig) -> None:
    """Until SIGTERM; Ended or KubeError say why it could not go on."""
    operation: Coroutine[Any, Any, None] = operate(config)
    asyncio.run(operation)
