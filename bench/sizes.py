"""How large everything is: the whole bench, one for a machine that others use too, and one that only shows it works."""

from __future__ import annotations

from dataclasses import dataclass

MI = 2**20


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of the bench."""

    name: str
    repeats: int
    scored: int
    """Rows (and columns) of the matrix that is scored, and that torch-pruning's model has."""
    transfer_bytes: int
    layers: int
    """Linear layers of the model whose cycle is run."""
    width: int
    cycles: int
    """Cycles for each number of workers."""
    formula: bool
    """Also with as many workers as the formula says."""
    raw_bytes: int
    """What the reference reads and writes between two phases."""
    steps: int
    """Training steps in which the tracker finds how often it may sample."""
    pairs: int
    threads: int
    """Of the training, at most."""
    cycles_live: int
    """Live cycles of one process."""
    models: tuple[tuple[int, int], ...]
    """(layers, width) of the models that growth goes over; at least two layers, so that there is a group."""
    groups: tuple[int, ...]
    records: tuple[int, ...]

    @property
    def judged(self) -> bool:
        """Whether the design's numbers for a cycle are about this size: below, starting processes is most of it."""
        return self.name == "full"


SIZES = {
    "small": Size(
        name="small",
        repeats=2,
        scored=256,
        transfer_bytes=33 * MI,
        layers=3,
        width=256,
        cycles=1,
        formula=False,
        raw_bytes=4 * MI,
        steps=4,
        pairs=2,
        threads=1,
        cycles_live=10,
        models=((2, 256),),
        groups=(1, 3),
        records=(10, 30),
    ),
    "medium": Size(
        name="medium",
        repeats=5,
        scored=2048,
        transfer_bytes=128 * MI,
        layers=10,
        width=1024,
        cycles=2,
        formula=True,
        raw_bytes=32 * MI,
        steps=120,
        pairs=10,
        threads=64,
        cycles_live=1000,
        models=((10, 256), (10, 1024)),
        groups=(1, 10, 100, 1000),
        records=(10, 100, 1000, 10_000),
    ),
    "full": Size(
        name="full",
        repeats=5,
        scored=4096,
        transfer_bytes=512 * MI,
        layers=60,
        width=4096,
        cycles=2,
        formula=True,
        raw_bytes=512 * MI,
        steps=120,
        pairs=40,
        threads=64,
        cycles_live=1000,
        models=((10, 1024), (24, 2048), (60, 4096)),
        groups=(1, 10, 100, 1000, 10_000),
        records=(10, 100, 1000, 10_000, 100_000),
    ),
}
