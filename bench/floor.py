"""A process of its own that only imports what a role imports, and says what that takes of memory and time."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module

IMPORTS = {"worker": ("numpy", "boto3"), "validator": ("torch",), "emrakul": ("emrakul.cli",)}


def main() -> None:
    role = sys.argv[1]
    began = time.perf_counter()
    modules = [import_module(name) for name in IMPORTS[role]]
    if role == "worker":
        modules[-1].client("s3", region_name="us-east-1")
    took = time.perf_counter() - began
    peak_rss = import_module("elesh.worker").peak_rss
    print(json.dumps({"rss": peak_rss(), "seconds": took}))


if __name__ == "__main__":
    main()
