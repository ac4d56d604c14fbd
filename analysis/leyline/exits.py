"""Exit codes of the workers: what became of one process. Analysis and apply are done when the store says so."""

from __future__ import annotations

DONE = 0
BAD_INPUT = 42
"""The checkpoint, the decision or a request breaks a rule; trying again gives the same answer."""
GAVE_UP = 43
"""One task has as many dead attempts as are allowed."""
STORE = 75
"""The store refused or did not answer; trying again may help (sysexits' EX_TEMPFAIL)."""
OUT_OF_MEMORY = 44
"""An allocation failed under the memory limit; the next attempt uses half the buffer."""
