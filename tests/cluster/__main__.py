"""Lets `python tests/cluster` be run as it stands."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the folder was run, but its modules are `cluster.…`

from cluster.command import main  # noqa: E402

sys.exit(main())
