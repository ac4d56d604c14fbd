"""What people put on top of worker pods: layers over one another, with what is ours kept out of them."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable
from typing import Any

from emrakul.api.policy import PodOverrides
from emrakul.invalid import Invalid
from emrakul.runtime import restricted

RESERVED = "emrakul-"
"""How the names of our own volumes begin."""
FOLDER = "/etc/emrakul"
"""Where our own volumes are mounted."""
TEMPORARY = "/tmp"  # noqa: S108  the pod's own
INDEX = "JOB_COMPLETION_INDEX"
"""Environment: the number of a worker. The Job controller adds it, but never to a container that has it already."""

_PARTS = ("limits", "requests")
_MAPPINGS = ("node_selector", "labels", "annotations", "security_context")
_SAME: dict[str, Callable[[dict[str, Any]], Any]] = {
    "env": lambda one: one.get("name"),
    "volumes": lambda one: one.get("name"),
    "volume_mounts": lambda one: one.get("mountPath"),
    "topology_spread_constraints": lambda one: (one.get("topologyKey"), one.get("whenUnsatisfiable")),
}
"""Lists in which the API takes only one object of a name."""


def layered(*layers: PodOverrides) -> PodOverrides:
    """The layers over one another, later ones stronger; Invalid names what none of them may ask for.

    Mappings and lists of named objects are merged, other lists are joined, anything else is replaced.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        restricted.check(layer)
        _check(layer)
        for name in layer.model_fields_set:
            before, value = merged.get(name), getattr(layer, name)
            if name == "resources":
                merged[name] = {
                    part: {**(before or {}).get(part, {}), **(value or {}).get(part, {})} for part in _PARTS
                }
            elif name in _MAPPINGS:
                merged[name] = {**(before or {}), **(value or {})}
            elif isinstance(value, tuple):
                merged[name] = _joined((*(before or ()), *value), _SAME.get(name, repr))
            elif value is not None:
                merged[name] = value
    return PodOverrides().model_copy(update=merged)


def _check(layer: PodOverrides) -> None:
    for volume in layer.volumes:
        if str(volume.get("name")).startswith(RESERVED):
            raise Invalid(f"podOverrides.volumes: names that begin with {RESERVED} are ours; rename {volume['name']}")
    for mount in layer.volume_mounts:
        path = posixpath.normpath(str(mount.get("mountPath")))
        if path == TEMPORARY or f"{path}/".startswith(f"{FOLDER}/"):
            raise Invalid(f"podOverrides.volumeMounts: {path} is ours ({TEMPORARY}, {FOLDER}); mount it elsewhere")
    if any(variable.get("name") == INDEX for variable in layer.env):
        raise Invalid(f"podOverrides.env: {INDEX} is what tells workers apart; remove it")
    for part, amounts in (layer.resources or {}).items():
        if part not in _PARTS or not isinstance(amounts, dict):
            raise Invalid(f"podOverrides.resources.{part}: only mappings {' and '.join(_PARTS)} can be given")
        if part == "limits" and "memory" in amounts:
            raise Invalid(
                "podOverrides.resources.limits.memory: set settings.analysisMemoryLimit or "
                "settings.validationMemoryLimit instead, which workers divide their buffers by"
            )


def _joined(objects: Iterable[Any], same: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Each object once, where it came first, as it came last."""
    return tuple({same(one): one for one in objects}.values())
