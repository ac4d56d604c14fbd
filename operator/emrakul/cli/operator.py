"""`emrakul operator`: what the chart's Deployment runs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from emrakul.cli.errors import UNEXPECTED, Rejected
from emrakul.cli.run import read
from emrakul.invalid import Invalid


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File that the chart writes: images, namespaces, tenants, defaults.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning"]), default="info", show_default=True)
@click.option("--debug", is_flag=True, expose_value=False, help="Show where an error comes from.")
def command(path: Path, *, log_format: str, log_level: str) -> None:
    """Follow policies and cycles of a cluster, or of some namespaces, until SIGTERM."""
    try:
        from emrakul.cluster import main
        from emrakul.cluster.kube import KubeError
        from emrakul.runtime.config import load_config
    except ModuleNotFoundError as error:
        raise Invalid(
            f"{error.name} is not installed; the operator needs `pip install 'emrakul[kubernetes]'`"
        ) from error
    config = load_config(read(path), name=str(path))
    _log(log_format, log_level)
    try:
        main.run(config)
    except (main.Ended, KubeError) as error:
        raise Rejected(str(error), UNEXPECTED) from error


def _log(form: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("emrakul").setLevel(level.upper())


class _Json(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
