"""Cuts analysis into requests: by topology alone, so that the pieces are the same whoever and however many work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from emrakul.settings import Settings
from leyline.messages import CheckpointMetadata, MaskRef, Slice, StructuralAnalysisRequest, Tie
from leyline.model import key_of
from leyline.topology import Kind, Parameter, Topology

Method = Literal["structured", "histogram", "refine", "select"]

ROUND: dict[Method, int] = {"structured": 0, "histogram": 1, "refine": 2, "select": 3}
"""The round of each method: basic pruning has three, and may follow structured analysis that failed."""

MAX_PARAMETERS = 5_000_000
"""In one request; a single row of more is a request of its own."""
MIN_REQUESTS = 16
"""So many where there are as many groups (basic: parameters): work enough to steal."""
CODE_VERSION = 3
"""Part of every key: raised when the same input would be answered otherwise."""

_EMBEDDING = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|emb|\w+_emb|wte|wpe|\w+_tokens?|\w*position\w*|shared(?=\.weight$))([._]|$)",
    re.IGNORECASE,
)
_TABLE = re.compile(r"(^|[._])((\w*_)?scales?(_inv)?|(\w*_)?zeros?(_points?)?|(\w*_)?mask|inv_freq)$", re.IGNORECASE)
"""What stands beside weights: scales and zero points of quantized ones, masks of attention."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is analysed: one checkpoint with its statistics, under its inherited masks and the settings."""

    cycle: str
    checkpoint: CheckpointMetadata
    topology: Topology
    inherited: MaskRef | None
    settings: Settings


def structured_requests(subject: Subject) -> tuple[StructuralAnalysisRequest, ...]:
    """All parameters that belong to groups, each sliced once, and every group's gate in exactly one request."""
    topology = subject.topology
    owned = {member.parameter for group in topology.groups for member in group.members}
    pieces = cut({name: topology.parameters[name] for name in owned}, at_least=min(MIN_REQUESTS, len(topology.groups)))
    gates: list[list[str]] = [[] for _ in pieces]
    for index, group in enumerate(topology.groups):
        gates[index * len(pieces) // len(topology.groups)].append(group.id)
    return tuple(
        _request(subject, "structured", index, slices=slices, groups=groups)
        for index, (slices, groups) in enumerate(zip(pieces, gates, strict=True))
    )


def basic_requests(
    subject: Subject,
    method: Literal["histogram", "refine", "select"],
    *,
    buckets: Mapping[str, int] | None = None,
    ties: Mapping[str, Tie] | None = None,
) -> tuple[StructuralAnalysisRequest, ...]:
    """One round of basic pruning over every prunable weight; all three rounds cut the same slices.

    `buckets` (refine) and `ties` (select) are by slice key.
    """
    parameters = prunable_parameters(subject.topology)
    return tuple(
        _request(
            subject,
            method,
            index,
            slices=slices,
            buckets={s.key: buckets[s.key] for s in slices if s.key in buckets} if buckets else {},
            ties={s.key: ties[s.key] for s in slices if s.key in ties} if ties else {},
        )
        for index, slices in enumerate(cut(parameters, at_least=min(MIN_REQUESTS, len(parameters))))
    )


def prunable_parameters(topology: Topology) -> dict[str, Parameter]:
    """What basic pruning may touch: matrices and kernels that are no norm, no embedding, untied and not declined.

    Embeddings are known by being tied or declined, else by their name, as are scales and masks; a wrong guess keeps
    weights, nothing more.
    """
    norms = {m.parameter for group in topology.groups for m in group.members if m.role == "norm"}
    declined = {found.name for found in topology.declined if found.kind is Kind.WEIGHT}
    return {
        name: parameter
        for name, parameter in sorted(topology.parameters.items())
        if len(parameter.shape) >= 2
        and parameter.size
        and not parameter.aliases
        and name not in norms
        and name not in declined
        and parameter.shape[:2] != (1, 1)  # a mask of attention: one of all heads, for each mini-batch
        and not _EMBEDDING.search(name)
        and not _TABLE.search(name)
    }


def slices_of(requests: Iterable[StructuralAnalysisRequest]) -> dict[str, tuple[Slice, ...]]:
    """Every parameter's slices in C order."""
    found: dict[str, list[Slice]] = {}
    for request in requests:
        for piece in request.slices:
            found.setdefault(piece.parameter, []).append(piece)
    return {name: tuple(sorted(pieces, key=lambda s: s.start)) for name, pieces in sorted(found.items())}


def cut(parameters: Mapping[str, Parameter], *, at_least: int) -> list[tuple[Slice, ...]]:
    """Slices of whole rows, in name order, in at least `at_least` pieces of at most MAX_PARAMETERS weights."""
    total = sum(parameter.size for parameter in parameters.values())
    room = min(MAX_PARAMETERS, max(1, -(-total // max(at_least, 1))))
    pieces: list[tuple[Slice, ...]] = []
    current: list[Slice] = []
    filled = 0
    for name, parameter in sorted(parameters.items()):
        rows = parameter.shape[0] if parameter.shape else 1
        width = parameter.size // rows if rows else 0
        row = 0
        while width and row < rows:
            take = min((room - filled) // width, rows - row)
            if take < 1 and current:
                pieces.append(tuple(current))
                current, filled = [], 0
                continue
            take = max(take, 1)
            current.append(Slice(parameter=name, start=row * width, stop=(row + take) * width))
            filled += take * width
            row += take
    if current:
        pieces.append(tuple(current))
    # few large rows make fewer pieces than asked for; gates can still be scored apart
    return pieces + [()] * (at_least - len(pieces))


def _request(
    subject: Subject,
    method: Method,
    index: int,
    *,
    slices: Sequence[Slice],
    groups: Sequence[str] = (),
    buckets: Mapping[str, int] | None = None,
    ties: Mapping[str, Tie] | None = None,
) -> StructuralAnalysisRequest:
    draft = StructuralAnalysisRequest(
        idempotency_key="unset",
        id=f"{ROUND[method]}-{index}",
        cycle=subject.cycle,
        method=method,
        checkpoint=subject.checkpoint.name,
        inherited=subject.inherited,
        groups=tuple(groups),
        slices=tuple(slices),
        importance=subject.settings.scorers,
        buckets=dict(buckets or {}),
        ties=dict(ties or {}),
    )
    return draft.model_copy(update={"idempotency_key": _key(subject, draft)})


def _key(subject: Subject, request: StructuralAnalysisRequest) -> str:
    """Everything that determines the answer, and nothing else: not the cycle, nor where the mask file lies."""
    checkpoint = subject.checkpoint
    read = [*checkpoint.weights, checkpoint.topology, *([checkpoint.importance] if checkpoint.importance else [])]
    return key_of(
        kind=request.method,
        code=CODE_VERSION,
        content={path: checkpoint.object(path).digest.root for path in read},
        masks=subject.inherited.digest if subject.inherited else None,
        settings=subject.settings.digest(),
        request=request.model_dump(mode="json", exclude={"idempotency_key", "cycle", "inherited"}),
    )
