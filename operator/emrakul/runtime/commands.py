"""The workers' commands, the same for every runtime. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from emrakul.core.snapshot import Phase


def command(phase: Phase, *, cycle_uri: str, step: int, launch: int, worker: int | str, of: int) -> tuple[str, ...]:
    """Arguments after the interpreter for one worker; `step` is the round (analyse) or the base.

    `worker` is its number, or the text that becomes its number where it runs.
    """
    common = ("--cycle", cycle_uri, "--launch", str(launch))
    share = ("--worker", str(worker), "--of", str(of))
    match phase:
        case Phase.ANALYSE:
            return ("-m", "elesh", *common, "--round", str(step), *share)
        case Phase.APPLY:
            return ("-m", "kasmina.apply", *common, "--base", str(step), *share)
        case Phase.VALIDATE:
            return ("-m", "urabrask", *common, "--base", str(step))


def recheck(*, run_uri: str, record: int) -> tuple[str, ...]:
    """Arguments after the interpreter for the recovery validation of one record's pair."""
    return ("-m", "urabrask", "--run", run_uri, "--record", str(record))


def adopt(
    *, run_uri: str, origin: str, step: int | None, epoch: int, model_id: str | None, exclude: Sequence[str]
) -> tuple[str, ...]:
    """Arguments after the interpreter for the import of a checkpoint; it prints what it did as JSON."""
    given = {"--step": step, "--model-id": model_id}
    more = [part for name, value in given.items() if value is not None for part in (name, str(value))]
    more += [f"--exclude={pattern}" for pattern in exclude]
    return ("-m", "kasmina.foreign", "--from", origin, "--run", run_uri, "--epoch", str(epoch), *more)
