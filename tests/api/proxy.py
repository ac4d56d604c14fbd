"""A proxy between the operator and the API server: it numbers what is asked, and breaks it where a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext, create_default_context

import aiohttp
import yaml
from aiohttp import web

from cluster.apiserver import ApiServer

READS = ("GET", "HEAD", "OPTIONS")
_HOP = {"host", "connection", "transfer-encoding", "content-length", "content-encoding", "accept-encoding"}


@dataclass(frozen=True)
class Asked:
    """One request and its answer; 0 is none."""

    method: str
    path: str
    code: int

    @property
    def is_write(self) -> bool:
        return self.method not in READS


@dataclass
class Fault:
    """At the `write`-th write from now on: it is not sent (`lost` is false), or its answer never arrives."""

    write: int
    lost: bool
    then: Callable[[], None]
    """Ends the operator."""
    happened: threading.Event = field(default_factory=threading.Event)
    at: str = ""


class Proxy:
    """Speaks HTTP to the operator, and HTTPS to the server with the operator's own identity."""

    def __init__(self, url: str, context: SSLContext, kubeconfig: Path) -> None:
        self._url, self._context = url, context
        self.kubeconfig = kubeconfig
        self.port = 0
        self.asked: list[Asked] = []
        self.fault: Fault | None = None
        self.mute = False
        """True: no watch says anything any more, and none ends."""
        self.refuse: Callable[[str, str], bool] | None = None
        """Whether a request, by method and path, gets a 503 instead of its answer."""
        self._session: aiohttp.ClientSession
        self.writes = 0
        """Since the last break_at."""

    async def serve(self, ready: Callable[[], None], stop: asyncio.Event) -> None:
        connector = aiohttp.TCPConnector(ssl=self._context, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            self._session = session
            runner = web.ServerRunner(web.Server(self._handle), handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
            ready()
            await stop.wait()
            await runner.cleanup()
        await asyncio.sleep(0.1)  # closed connections go in the loop's next turns

    def break_at(self, write: int, *, lost: bool, then: Callable[[], None]) -> Fault:
        self.writes = 0
        self.fault = Fault(write, lost, then)
        return self.fault

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.refuse is not None and self.refuse(request.method, request.path):
            return web.Response(status=503)
        fault = self._reached(request)
        if fault is not None and not fault.lost:
            raise self._end(fault, request)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        body = await request.read()
        async with self._session.request(
            request.method, f"{self._url}{request.raw_path}", headers=headers, data=body or None
        ) as answer:
            self.asked.append(Asked(request.method, request.raw_path, answer.status))
            if fault is not None:
                await answer.read()
                raise self._end(fault, request)
            return await self._pass_on(request, answer)

    async def _pass_on(self, request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
        response = web.StreamResponse(status=answer.status, headers=kept)
        await response.prepare(request)
        watches = "watch" in request.query
        async for chunk in answer.content.iter_any():
            if not (self.mute and watches):
                await response.write(chunk)
        while self.mute and watches:
            await asyncio.sleep(1)
        await response.write_eof()
        return response

    def _reached(self, request: web.BaseRequest) -> Fault | None:
        if request.method in READS:
            return None
        self.writes += 1
        fault = self.fault
        return fault if fault is not None and self.writes == fault.write else None

    def _end(self, fault: Fault, request: web.BaseRequest) -> Exception:
        fault.then()
        fault.at = f"{request.method} {request.path}"
        self.fault = None
        fault.happened.set()
        return ConnectionResetError("the operator is gone")


@contextmanager
def proxy(server: ApiServer, folder: Path, *, kubeconfig: Path | None = None) -> Iterator[Proxy]:
    """A proxy for the user of `kubeconfig` (a token is in it), or for an administrator."""
    context = create_default_context(cafile=str(server.authority.root.certificate))
    user = {}
    if kubeconfig is None:
        pair = server.authority.client("proxied", groups=("system:masters",))
        context.load_cert_chain(pair.certificate, pair.key)
    else:
        user = yaml.safe_load(kubeconfig.read_text())["users"][0]["user"]
    between = Proxy(server.url, context, folder / "proxied.yaml")
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(between.serve(ready.set, stop),), daemon=True)
    thread.start()
    assert ready.wait(30)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "proxied",
        "clusters": [{"name": "proxied", "cluster": {"server": f"http://127.0.0.1:{between.port}"}}],
        "users": [{"name": "proxied", "user": user}],
        "contexts": [{"name": "proxied", "context": {"cluster": "proxied", "user": "proxied"}}],
    }
    between.kubeconfig.write_text(yaml.safe_dump(config))
    try:
        yield between
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
