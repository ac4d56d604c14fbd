"""A run as it was when a cycle began, on this machine: so that `emrakul run` can do again what the cluster did."""

from __future__ import annotations

import re

from leyline import layout
from leyline.local import LocalStore
from leyline.log import Log
from leyline.records import Admit, Record
from leyline.store import ObjectStore

_REPORT = re.compile(r"reports/\d+-(\d+)\.json")


def before(source: ObjectStore, admitted: Record, target: LocalStore) -> None:
    """Copies all that there was before the record that admitted the cycle."""
    assert isinstance(admitted.body, Admit)
    state = Log(source).tail().state
    pair = state.pair(admitted.body.base)
    assert pair is not None
    later = {layout.record(n) for n in range(admitted.n, state.n + 1)}
    for head in source.list(""):
        report = _REPORT.fullmatch(head.key)
        if head.key in later or head.key.startswith(f"cycles/{admitted.id}/"):
            continue
        if report is not None and int(report[1]) > pair.step:
            continue
        target.put_if_absent(head.key, source.get(head.key))
