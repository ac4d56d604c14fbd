"""Where everything lies in a run. Nobody else spells a path."""

from __future__ import annotations

GENESIS = "log/0/0.json"
TOPOLOGY = "topology.json"
"""What may be pruned, in a checkpoint's folder."""
READY = "READY.json"
"""Written last: a checkpoint exists once this does (an envelope around CheckpointMetadata)."""


def record(n: int) -> str:
    return f"log/{n // 1000}/{n}.json"


def state(digest: str) -> str:
    return f"state/{digest}.json"


def checkpoint(name: str, path: str = "") -> str:
    return f"checkpoints/{name}/{path}"


def reports(term: int) -> str:
    """Where a term's reports begin; they order by step."""
    return f"reports/{term}-"


def report(term: int, step: int) -> str:
    return f"{reports(term)}{step:012d}.json"


def results(cycle: str) -> str:
    return f"reports/results-{cycle}.json"


def sent(cycle: str) -> str:
    """The sink has taken the results of this cycle: whoever finds no such mark sends them again."""
    return f"reports/sent-{cycle}.json"


def recovery_model(record: int) -> str:
    """What the validator said of the pair that the rollback of log record `record` went back to."""
    return f"reports/recovery-{record}-model.json"


def recovery(record: int) -> str:
    """What recovery validation found after the rollback that is log record `record`."""
    return f"reports/recovery-{record}.json"


def requests(cycle: str, round_: int) -> str:
    return f"cycles/{cycle}/requests-{round_}.json"


def started(cycle: str, phase: str, launch: int) -> str:
    """Start mark of one launch of a phase (`analyse`, `apply`, `validate`): its time limit runs from here."""
    return f"cycles/{cycle}/started/{phase}-{launch}"


def attempts(cycle: str, request: str = "") -> str:
    return f"cycles/{cycle}/attempts/{request}{'/' if request else ''}"


def responses(cycle: str, request: str = "") -> str:
    return f"cycles/{cycle}/responses/{request}{'/' if request else ''}"


def forced(cycle: str) -> str:
    """The decision that a person forces on a cycle; its digest is in the admit record."""
    return f"cycles/{cycle}/forced.json"


def decision(cycle: str) -> str:
    return f"cycles/{cycle}/decision.json"


def on_base(cycle: str, base: int, path: str = "") -> str:
    """What belongs to one base of a cycle: a rebase (the trainer published meanwhile) has a folder of its own."""
    return f"cycles/{cycle}/on-{base}/{path}"


def candidate(cycle: str, base: int, path: str = "") -> str:
    return on_base(cycle, base, f"candidate/{path}")


def masks(cycle: str, base: int) -> str:
    return candidate(cycle, base, "masks.safetensors")


def update(cycle: str, base: int) -> str:
    """CheckpointUpdate: what apply is to do on this base."""
    return on_base(cycle, base, "update.json")


def apply_error(cycle: str, base: int) -> str:
    """{"message": sentence}: why apply cannot work on this base; the first worker that noticed writes it."""
    return on_base(cycle, base, "apply-error.json")


def manifest(cycle: str, base: int) -> str:
    """The candidate's manifest, written last by apply: the candidate exists once it does."""
    return candidate(cycle, base, "MANIFEST.json")


def validation_request(cycle: str, base: int) -> str:
    return on_base(cycle, base, "validation.json")


def verdict(cycle: str, base: int) -> str:
    return on_base(cycle, base, "verdict.json")


def validation_error(cycle: str, base: int) -> str:
    """Why urabrask could not judge, {"message", "reason"}, beside its exit code 42: the input breaks a rule."""
    return on_base(cycle, base, "validation-error.json")


def calculation_rate(cycle: str) -> str:
    """What `worker_calculation_rate: auto` stands for in this cycle: lies with the attempts, as it comes from times."""
    return f"{attempts(cycle, 'scale')}rate.json"


def validation_work(cycle: str, base: int) -> str:
    """What urabrask's byte checks took (leyline.work), beside the seconds of all its parts."""
    return f"{attempts(cycle, f'validate-{base}')}bytes.json"


def validation_telemetry(cycle: str, base: int) -> str:
    """Seconds that urabrask's parts took: lies with the attempts, since no two of them take equally long."""
    return f"{attempts(cycle, f'validate-{base}')}seconds.json"
