"""The trainer's side: what is measured while training, published, taken back, and kept zero.

A trainer needs `trace_topology`, `ImportanceTracker` and `TrainingRun`; who only wants weights, `load_tip`. Names are
imported when they are asked for, because the apply worker and the formats in this package run without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kasmina.enforce import MaskEnforcer, MasksDoNotFit
    from kasmina.isolation import IsolationLeak
    from kasmina.load import Loaded, NoLoadableCheckpoint
    from kasmina.pair import PairDamaged
    from kasmina.publish import PublishRefused
    from kasmina.run import Reported, TrainingRun, load_tip
    from kasmina.sync import SyncResult
    from kasmina.topology import trace_topology
    from kasmina.tracker import ImportanceTracker
    from kasmina.training_state import ModelDoesNotFit

__all__ = [
    "ImportanceTracker",
    "IsolationLeak",
    "Loaded",
    "MaskEnforcer",
    "MasksDoNotFit",
    "ModelDoesNotFit",
    "NoLoadableCheckpoint",
    "PairDamaged",
    "PublishRefused",
    "Reported",
    "SyncResult",
    "TrainingRun",
    "load_tip",
    "trace_topology",
]

_WHERE = {
    "ImportanceTracker": "tracker",
    "IsolationLeak": "isolation",
    "Loaded": "load",
    "MaskEnforcer": "enforce",
    "MasksDoNotFit": "enforce",
    "ModelDoesNotFit": "training_state",
    "NoLoadableCheckpoint": "load",
    "PairDamaged": "pair",
    "PublishRefused": "publish",
    "Reported": "run",
    "SyncResult": "sync",
    "TrainingRun": "run",
    "load_tip": "run",
    "trace_topology": "topology",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module kasmina has no {name}")
    return getattr(importlib.import_module(f"kasmina.{_WHERE[name]}"), name)
