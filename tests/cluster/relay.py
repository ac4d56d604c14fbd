"""A port of this process that stands for one of the cluster, whose network this process may not be in."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Connect = Callable[[], socket.socket]
_BYTES = 1 << 16


@contextmanager
def relayed(connect: Connect) -> Iterator[int]:
    """The port on 127.0.0.1; whoever connects to it talks to what `connect` connects to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_accept, args=(server, connect), daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # or accept() would wait on


def _accept(server: socket.socket, connect: Connect) -> None:
    with suppress(OSError):  # closed
        while True:
            client, _ = server.accept()
            threading.Thread(target=_serve, args=(client, connect), daemon=True).start()


def _serve(client: socket.socket, connect: Connect) -> None:
    with client:
        try:
            target = connect()
        except OSError:
            return  # as the one behind would refuse
        with target:
            back = threading.Thread(target=_copy, args=(target, client), daemon=True)
            back.start()
            _copy(client, target)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(_BYTES):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
