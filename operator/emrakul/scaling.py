"""How many analysis workers a cycle gets: the scaling formula, read as arithmetic and never executed as code."""

from __future__ import annotations

import ast
import math
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Literal, Protocol

from emrakul.invalid import Invalid

MAX_LENGTH = 200
MAX_DEPTH = 20
MAX_LITERAL = 10**15
DEFAULT_FORMULA = "ceil(num_params / (500000 * 300))"
"""The specification's, with the rate and the budget as numbers."""
DEFAULT_RATE = 500_000
"""Parameters a worker scores in a second, until something is measured."""
NAMED_FORMULA = "ceil(num_params / (worker_calculation_rate * worker_time_budget))"
NAMES = ("num_params", "worker_calculation_rate", "worker_time_budget")

_FUNCTIONS: dict[str, tuple[int, Callable[..., Fraction]]] = {
    "ceil": (1, lambda x: Fraction(math.ceil(x))),
    "floor": (1, lambda x: Fraction(math.floor(x))),
    "min": (2, min),
    "max": (2, max),
}
"""By name: the fewest arguments it takes (ceil and floor: exactly one), and what it does."""

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
}


_PARSING = threading.Lock()
"""Python 3.11 counts the depth of a tree for all threads together: two that parse at once can end in SystemError."""


class Scaling(Protocol):
    """The settings that this needs."""

    @property
    def analysis_parallel_workers(self) -> int: ...
    @property
    def worker_scaling_formula(self) -> str: ...
    @property
    def worker_calculation_rate(self) -> int | Literal["auto"]: ...
    @property
    def worker_time_budget(self) -> int: ...
    @property
    def replicas(self) -> int: ...


def workers(
    settings: Scaling,
    *,
    num_params: int,
    requests: int,
    cores: int | None = None,
    override: int | None = None,
    measured: int = DEFAULT_RATE,
) -> int:
    """W = max(analysis_parallel_workers, formula), never more than requests, on one machine never more than cores.

    With three replicas W is at least 3, whatever the cores. `override` (a person's --workers) wins. `measured` is what
    worker_calculation_rate stands for where it is auto.
    """
    if override is not None:
        if override < settings.replicas:
            raise Invalid(
                f"{override} workers cannot reach consensus: consensus.replicas is {settings.replicas}, and "
                f"each answer needs that many different workers; ask for at least {settings.replicas}"
            )
        return override
    wanted = max(settings.analysis_parallel_workers, formula_workers(settings, num_params, measured))
    wanted = min(wanted, requests, cores if cores is not None else wanted)
    return max(wanted, settings.replicas, 1)


def formula_workers(settings: Scaling, num_params: int, measured: int = DEFAULT_RATE) -> int:
    """The formula's value for a model of `num_params` parameters, rounded up, at least 1."""
    formula = settings.worker_scaling_formula
    if settings.worker_calculation_rate == "auto" and _is_default(formula):
        formula = NAMED_FORMULA
    return max(1, math.ceil(evaluate(formula, _names(settings, num_params, measured))))


def check_formula(settings: Scaling) -> None:
    """Refuse a formula that cannot be evaluated, or whose literals contradict the rate and budget keys."""
    tree = _parse(settings.worker_scaling_formula)
    evaluate(settings.worker_scaling_formula, _names(settings, 10**9, DEFAULT_RATE))
    rate, budget = settings.worker_calculation_rate, settings.worker_time_budget
    if rate == "auto":
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if "worker_calculation_rate" not in names and not _is_default(settings.worker_scaling_formula):
            raise Invalid(
                f"worker_calculation_rate is auto, but worker_scaling_formula {settings.worker_scaling_formula!r} does "
                f"not name it, so that nothing measured could change it; write {NAMED_FORMULA}, or give the rate as a "
                "number"
            )
        rate = DEFAULT_RATE
    agreed = {Fraction(rate), Fraction(budget), Fraction(rate * budget)}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div | ast.FloorDiv):
            literals = [Fraction(str(n.value)) for n in ast.walk(node.right) if isinstance(n, ast.Constant)]
            named = any(isinstance(n, ast.Name) and n.id in NAMES for n in ast.walk(node.right))
            wrong = [value for value in literals if value not in agreed]
            if not wrong and literals and not named:
                value = _value(node.right, {}, settings.worker_scaling_formula)
                wrong = [value] if value not in agreed else []
            if wrong:
                raise Invalid(
                    f"worker_scaling_formula divides by {wrong[0]}, but worker_calculation_rate is "
                    f"{settings.worker_calculation_rate} and "
                    f"worker_time_budget is {budget}; write these names in the formula instead of numbers"
                )


def evaluate(formula: str, names: Mapping[str, int]) -> Fraction:
    """The exact value of an arithmetic formula over `names`; Invalid says what it may not contain."""
    return _value(_parse(formula), names, formula)


def _names(settings: Scaling, num_params: int, measured: int) -> dict[str, int]:
    rate = settings.worker_calculation_rate
    values = (num_params, measured if rate == "auto" else rate, settings.worker_time_budget)
    return dict(zip(NAMES, values, strict=True))


def _is_default(formula: str) -> bool:
    """However it is spaced."""
    return ast.dump(_parse(formula)) == ast.dump(_parse(DEFAULT_FORMULA))


@lru_cache(maxsize=64)  # every look at a cycle reads its settings, and with them the formula
def _parse(formula: str) -> ast.expr:
    if len(formula) > MAX_LENGTH:
        raise Invalid(f"worker_scaling_formula has {len(formula)} characters; at most {MAX_LENGTH} are allowed")
    try:
        with _PARSING:
            tree = ast.parse(formula.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Invalid(f"worker_scaling_formula {formula!r} is no arithmetic expression") from error
    _check(tree, formula, 0)
    return tree


def _check(node: ast.expr, formula: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Invalid(f"worker_scaling_formula is nested deeper than {MAX_DEPTH} levels; simplify it")
    match node:
        case ast.Constant(value=int() | float() as value) if type(value) is not bool and abs(value) <= MAX_LITERAL:
            inner: list[ast.expr] = []
        case ast.Name(id=name) if name in NAMES:
            inner = []
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            inner = [left, right]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            inner = [operand]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and _arity(name, args):
            inner = args
        case _:
            raise Invalid(
                f"worker_scaling_formula contains {ast.unparse(node)!r}; it may use numbers, {', '.join(NAMES)}, "
                "+ - * / //, ceil, floor, min and max"
            )
    for part in inner:
        _check(part, formula, depth + 1)


def _arity(name: str, args: list[ast.expr]) -> bool:
    fewest = _FUNCTIONS[name][0]
    return len(args) == 1 if fewest == 1 else len(args) >= fewest


def _value(node: ast.expr, names: Mapping[str, int], formula: str) -> Fraction:
    match node:
        case ast.Constant(value=value):
            return Fraction(str(value))
        case ast.Name(id=name):
            return Fraction(names[name])
        case ast.BinOp(left=left, op=op, right=right):
            try:
                return _OPERATORS[type(op)](_value(left, names, formula), _value(right, names, formula))
            except ZeroDivisionError as error:
                raise Invalid(f"worker_scaling_formula {formula!r} divides by zero") from error
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names, formula)
        case ast.UnaryOp(operand=operand):
            return _value(operand, names, formula)
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name][1](*(_value(argument, names, formula) for argument in args))
    raise AssertionError(f"unchecked node {node!r}")  # _check lets nothing else through
