"""Exit codes of the workers: what became of one process. Analysis and apply are done when the store says so."""

from __future__ import annotations

DONE = 0
BAD_INPUT = 42
"""The checkpoint, the decision or a request breaks a rule; trying again gives the same answer."""
GAVE_UP = 43
"""One task has as many dead attempts as are allowed."""
KEY = 45
"""The statistics are encrypted under a data key that this worker does not have."""
STORE = 75
"""The store refused or did not answer; trying again may help (sysexits' EX_TEMPFAIL)."""
OUT_OF_MEMORY = 44
"""An allocation failed under the memory limit; the next attempt uses half the buffer."""


def sentence(said: str) -> str:
    """What a worker that ended says of it: the last line of its standard error; empty if it wrote none."""
    lines = said.strip().splitlines()
    return lines[-1].strip() if lines else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Python tells by a RuntimeError that a thread gets no stack, and torch that a tensor gets no memory."""
    said = str(error)
    return isinstance(error, MemoryError) or "can't start new thread" in said or "can't allocate memory" in said
