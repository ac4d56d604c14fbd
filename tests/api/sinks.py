"""A sink for CloudEvents: a real HTTP server that keeps what it gets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Received:
    url: str
    answer: int = 202
    events: list[dict[str, Any]] = field(default_factory=list)
    content: set[str] = field(default_factory=set)


@contextmanager
def sink() -> Iterator[Received]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.content.add(self.headers["Content-Type"])
            received.events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(received.answer)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received = Received(f"http://127.0.0.1:{server.server_port}/events?key=hidden")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield received
        finally:
            server.shutdown()
