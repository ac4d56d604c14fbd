"""The operator as a process of its own: started, killed, and started again as a Deployment would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from servers import free_ports


class Operator:
    """`emrakul operator` with a kubeconfig; its log is kept over all its lives."""

    def __init__(
        self, folder: Path, kubeconfig: Path, *, config: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (self.port,) = free_ports(1)
        images = {"worker": "worker@sha256:0", "validator": "validator@sha256:0"}
        whole = {"images": images, "healthPort": self.port, **config}
        self._config = folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(whole))
        self.log = folder / "operator.log"
        self._environment = {**os.environ, "KUBECONFIG": str(kubeconfig), **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._enough = threading.Event()
        self._keeper: threading.Thread | None = None

    def start(self) -> None:
        command = (sys.executable, "-m", "emrakul", "operator", "--config", str(self._config), "--log-level", "debug")
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, env=self._environment, stdout=output, stderr=output)
        self.starts += 1

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def kept(self) -> None:
        """From now on it is started again whenever it has ended, as a Deployment does it."""
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        while not self._enough.wait(0.1):
            if self.process is not None and self.process.poll() is not None:
                self.start()

    def __enter__(self) -> Operator:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        if self._keeper is not None:
            self._keeper.join()
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def again(self, **config: Any) -> None:
        """Start it with another configuration."""
        self._config.write_text(yaml.safe_dump(yaml.safe_load(self._config.read_text()) | config))
        self.start()

    def health(self, path: str = "health/emrakul") -> Any:
        """JSON of the health endpoint, or the text of another; None while nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=5) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            text = error.read().decode()
        except OSError:
            return None
        return json.loads(text) if path == "health/emrakul" else text

    def peak_rss(self) -> int:
        """Bytes."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")


def wait_for(found: Any, *, seconds: float = 60.0, every: float = 0.1, told: Any = None) -> Any:
    """The first answer of `found()` that is true; if none comes, the error shows `told()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := found():
            return answer
        time.sleep(every)
    raise AssertionError(f"it did not happen in {seconds:.0f} s; there is {told() if told else found()}")
