"""Options that commands share, and what they open: the store of a run, its log, keys and trust."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from emrakul.cli.output import Output
from leyline.envelope import SigningKey, Trust, signing_keys_from_environment, trust_from_environment
from leyline.log import Log
from leyline.open import open_store, probe
from leyline.store import ObjectStore

Command = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How the store is reached; what is left out comes from the AWS variables."""

    endpoint: str | None
    region: str | None
    ca_bundle: str | None

    def open(self, uri: str) -> Opened:
        """The run at `uri`, with the keys and the trust of the environment."""
        keys, trust = signing_keys_from_environment(), trust_from_environment()
        store = open_store(uri, endpoint=self.endpoint, region=self.region, ca_bundle=self.ca_bundle)
        return Opened(store=store, log=Log(store, keys=keys, trust=trust), trust=trust, keys=keys, options=self)

    @property
    def environment(self) -> dict[str, str]:
        """The same for a worker process."""
        named = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": self.region, "AWS_CA_BUNDLE": self.ca_bundle}
        return {name: value for name, value in named.items() if value}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """One run."""

    store: ObjectStore
    log: Log
    trust: Trust | None
    keys: tuple[SigningKey, ...]
    options: StoreOptions

    def for_writing(self) -> Opened:
        """The same, once it is known that there is a run and that its store honours conditions."""
        self.log.tail()
        probe(self.store)
        return self


def store_options(command: Command) -> Command:
    """--endpoint, --region, --ca-bundle; the command gets them as `options`."""

    @click.option("--endpoint", metavar="URL", help="The S3 server, if it is not AWS [AWS_ENDPOINT_URL].")
    @click.option("--region", help="Its region [AWS_REGION].")
    @click.option("--ca-bundle", metavar="FILE", help="PEM file of the CA that signed its certificate [AWS_CA_BUNDLE].")
    @functools.wraps(command)
    def wrapped(*args: Any, endpoint: str | None, region: str | None, ca_bundle: str | None, **rest: Any) -> Any:
        return command(*args, options=StoreOptions(endpoint=endpoint, region=region, ca_bundle=ca_bundle), **rest)

    return wrapped


def output_options(command: Command) -> Command:
    """--output and --debug; the command gets an `out`."""

    @click.option(
        "--output",
        "-o",
        "form",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="json: one document on stdout.",
    )
    @click.option("--debug", is_flag=True, expose_value=False, help="Show where an error comes from.")
    @functools.wraps(command)
    def wrapped(*args: Any, form: str, **rest: Any) -> Any:
        return command(*args, out=Output(json=form == "json"), **rest)

    return wrapped


def run_options(command: Command) -> Command:
    """The argument RUN with all of the above; the command gets the opened run and an output."""

    @click.argument("uri", metavar="RUN")
    @store_options
    @output_options
    @functools.wraps(command)
    def wrapped(*, uri: str, options: StoreOptions, out: Output, **rest: Any) -> Any:
        return command(options.open(uri), out, **rest)

    return wrapped
