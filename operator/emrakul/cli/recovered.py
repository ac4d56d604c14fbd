"""Recovery validation as commands run and show it: the validator is a process on this machine."""

from __future__ import annotations

from emrakul.cli.errors import DAMAGED, Rejected
from emrakul.cli.options import Opened
from emrakul.recovery import Recovery, recover
from emrakul.rollback import Validate, newest_settings
from emrakul.runtime.recheck import local_recheck
from emrakul.settings import Settings
from leyline.records import Record


def validator(run: Opened, settings: Settings) -> Validate:
    """urabrask, with the limits of the newest cycle's settings."""
    return local_recheck(
        run.store.uri,
        environment=run.options.environment,
        seconds=settings.validation_timeout,
        memory_bytes=settings.validation_memory_limit,
    )


def look(run: Opened, rollback: Record) -> Recovery:
    """What recovery validation finds after a rollback record, or found before."""
    return recover(run.store, run.log, rollback, validate=validator(run, newest_settings(run.log)))


def rows(found: Recovery) -> list[tuple[str, str]]:
    """One line a look, for people."""
    return [(look.name, f"{look.outcome}: {look.message}") for look in found.looks]


def judge(found: Recovery) -> None:
    """Rejected if one of the looks failed; what is pending is no failure."""
    if found.outcome == "failed":
        why = "; ".join(look.message for look in found.looks if look.outcome == "failed")
        raise Rejected(f"the tip is at record {found.to}, but recovery validation failed: {why}", DAMAGED)
