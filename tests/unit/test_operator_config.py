"""The operator's configuration: tenants are held to their prefixes, and mistakes are sentences."""

from __future__ import annotations

import pytest

from emrakul.invalid import Invalid
from emrakul.runtime.config import OperatorConfig, load_config

IMAGES = "images: {worker: w, validator: v}\n"


def config(text: str = "") -> OperatorConfig:
    return load_config(IMAGES + text)


def test_nothing_is_allowed_by_default_in_a_whole_cluster() -> None:
    assert not config().allows("team", "s3://runs/team/one")


def test_in_chosen_namespaces_everything_is_until_something_is_said() -> None:
    assert config("namespaces: [team]").allows("team", "s3://runs/team/one")
    told = config("namespaces: [team]\nallowedRunPrefixes: {team: ['s3://runs/team']}")
    assert not told.allows("team", "s3://runs/other")


@pytest.mark.parametrize(
    ("run", "allowed"),
    [
        ("s3://runs/team", True),
        ("s3://runs/team/", True),
        ("s3://runs/team/one", True),
        ("s3://runs/teammate", False),
        ("s3://runs/teammate/one", False),
        ("s3://runs", False),
        ("s3://runs/other/team/one", False),
        ("file:///runs/team/one", False),
        ("/runs/team", False),
    ],
)
def test_a_prefix_ends_at_a_slash(run: str, allowed: bool) -> None:
    assert config("allowedRunPrefixes: {team: ['s3://runs/team/']}").allows("team", run) is allowed


def test_one_tenant_has_not_the_prefixes_of_another_but_those_of_all() -> None:
    both = config("allowedRunPrefixes: {a: ['s3://runs/a'], '*': ['s3://shared']}")
    assert not both.allows("b", "s3://runs/a/one")
    assert both.allows("b", "s3://shared/one")


def test_a_file_is_nobodys_run_even_where_every_store_is_allowed() -> None:
    assert not config("namespaces: [team]").allows("team", "file:///etc")
    assert not config("allowedRunPrefixes: {'*': ['s3://']}").allows("team", "file:///etc")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("allowed_run_prefixes: {}", "did you mean allowedRunPrefixes"),
        ("healthPort: 70000", "healthPort"),
        ("allowedRunPrefixes: {team: ['file:///x']}", "allowedRunPrefixes"),
        ("sink: ftp://x", "sink"),
        ("defaults: {settings: {safetyMargin: 0.5}}", 'write "0.5"'),
    ],
)
def test_a_mistake_is_a_sentence_that_names_the_key(text: str, says: str) -> None:
    with pytest.raises(Invalid, match=says.replace("?", r"\?")):
        config(text)
