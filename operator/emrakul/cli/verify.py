"""`emrakul verify RUN`: everything that can be checked by reading."""

from __future__ import annotations

import click

from emrakul.cli.errors import DAMAGED, Rejected
from emrakul.cli.options import Opened, run_options
from emrakul.cli.output import Output, size
from emrakul.verify import verify_run


@click.command()
@run_options
def command(run: Opened, out: Output) -> None:
    """Check the chain of records, their states, and every object of every checkpoint against its digest."""
    with out.progress() as bars:
        task = bars.add_task("records", total=None)
        found = verify_run(
            run.store,
            run.log,
            trust=run.trust,
            begin=lambda key, count: bars.reset(task, description=key[-40:], total=count),
            progress=lambda count: bars.advance(task, count),
        )
    if out.json:
        out.document(
            {
                "uri": run.store.uri,
                "ok": not found.faults,
                "records": found.records,
                "signed": found.signed,
                "trusted": run.trust is not None,
                "pairs": found.pairs,
                "objects": found.objects,
                "bytes": found.bytes,
                "gone": found.gone,
                "faults": [{"object": key, "message": why} for key, why in found.faults.items()],
            }
        )
    else:
        trusted = "signed by trusted keys" if run.trust else "signatures not checked (EMRAKUL_TRUST is not set)"
        rows = [
            ("records", f"{found.records} in one chain, {trusted}"),
            ("pairs", f"{found.pairs}"),
            ("objects", f"{found.objects}, {size(found.bytes)}, each chunk's SHA-256"),
        ]
        if found.gone:
            rows.append(("deleted", f"{found.gone} objects of the audit were deleted with what they belonged to"))
        rows += [("FAULT", why) for why in found.faults.values()]
        out.facts(rows)
    if found.faults:
        text = f"{run.store.uri}: {len(found.faults)} of its objects or records are missing or wrong"
        raise Rejected(f"{text}; restore them from a copy, or roll back to a pair that is whole", DAMAGED)
