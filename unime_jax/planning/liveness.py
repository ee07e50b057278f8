"""Estimates what a program keeps in memory beside its arguments, from its jaxpr.

Values are made in the order of the program and freed after their last use. What XLA fuses
(elementwise operations and the like) takes no memory unless a product, a loop or a result needs it
whole. The compiler may reorder and does pad, so this is an estimate: `--compile` measures.
"""

import collections
import dataclasses
import math
from typing import Any

from jax.extend import core

from unime_jax.planning import flops, memory

_CALLS = ("pjit", "jit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call",
          "custom_vjp_call", "custom_vjp_call_jaxpr")  # fmt: skip
# Need their operands whole, and make a whole result.
_WHOLE = ("dot_general", "conv_general_dilated", "scan", "while", "cond", "sort", "scatter",
          "scatter-add", "dynamic_update_slice", "top_k", "cumsum", "shard_map")  # fmt: skip


@dataclasses.dataclass(eq=False)
class _Value:
    """An array of the program; `bytes` is None for arguments, which are counted elsewhere."""

    bytes: float | None = None


@dataclasses.dataclass
class _Operation:
    equation: Any
    inputs: list[_Value]
    outputs: list[_Value]


def peak(jaxpr, *, flash: bool) -> float:
    """Estimates the most bytes that values of a program take at a time, arguments left out.

    Args:
      jaxpr: a program of one device; with `flash` one of whole attention (`flops.trace`).
      flash: whether attention never holds the scores of all pairs of positions.
    """
    return _levels(jaxpr, flash)[0]


def kept(jaxpr, *, flash: bool, scope: str = "loss") -> float:
    """Estimates the bytes that a step holds when its loss begins, arguments left out.

    It is what the way back reads of the way there: of several groups of rows all hold theirs.

    Args:
      jaxpr, flash: as for `peak`.
      scope: `jax.named_scope` of the loss.
    """
    return _levels(jaxpr, flash, scope)[1]


def _levels(jaxpr, flash: bool, scope: str | None = None) -> tuple[float, float]:
    """Returns the most bytes, and those that are held where a scope begins (0 without)."""
    operations, results = _inline(jaxpr, {}, flash)
    whole = set(results)
    for operation in operations:
        if operation.equation.primitive.name in _WHOLE:
            whole |= {*operation.inputs, *operation.outputs}
    last = dict.fromkeys(results, len(operations))
    for place in reversed(range(len(operations))):
        operation = operations[place]
        # What is fused into its readers keeps its own operands alive until then.
        fused = [last.get(value, place) for value in operation.outputs if value not in whole]
        for value in operation.inputs:
            last[value] = max(last.get(value, -1), place, *fused)
    freed = collections.defaultdict(list)
    for value, place in last.items():
        freed[place].append(value)
    alive, most, held, at_scope = 0.0, 0.0, set(), None
    for place, operation in enumerate(operations):
        if at_scope is None and scope and scope in str(operation.equation.source_info.name_stack):
            at_scope = alive
        for value in operation.outputs:
            if value in whole and value in last:
                held.add(value)
                alive += value.bytes
        most = max(most, alive + _inside(operation.equation, flash))
        for value in freed[place]:
            if value in held:
                alive -= value.bytes
    return most, at_scope or 0.0


def _inside(equation, flash: bool) -> float:
    """Returns what the body of a loop or branch takes while it runs."""
    name = equation.primitive.name
    if name not in ("scan", "cond"):
        return 0.0
    most = 0.0
    for body, _ in flops.bodies(equation):
        own = peak(body, flash=flash)
        if name == "scan":  # one iteration's slices of what is scanned over
            pairs = zip(equation.invars, body.invars, strict=True)
            own += sum(
                _size(inner, flash) for outer, inner in pairs if outer.aval.ndim > inner.aval.ndim
            )
        most = max(most, own)
    return most


def _inline(jaxpr, known: dict, flash: bool) -> tuple[list[_Operation], list[_Value]]:
    """Returns the operations of a program, calls opened, and its results.

    A body may be called several times: the values it makes are new each time.
    """
    operations: list[_Operation] = []
    for equation in jaxpr.eqns:
        inputs = [_value(var, known) for var in equation.invars]
        bodies = [body for body, _ in flops.bodies(equation)] if _is_call(equation) else []
        if bodies and len(bodies[0].invars) == len(inputs):
            found, outputs = _inline(
                bodies[0], dict(zip(bodies[0].invars, inputs, strict=True)), flash
            )
            operations += found
        else:
            outputs = [_Value(_size(var, flash)) for var in equation.outvars]
            operations.append(_Operation(equation, inputs, outputs))
        known.update(zip(equation.outvars, outputs, strict=True))
    return operations, [_value(var, known) for var in jaxpr.outvars]


def _is_call(equation) -> bool:
    return equation.primitive.name in _CALLS


def _value(var, known: dict) -> _Value:
    if isinstance(var, core.Literal):
        return _Value()
    return known.setdefault(var, _Value())


def _size(var, flash: bool) -> float:
    shape = getattr(var.aval, "shape", ())
    if flash and len(shape) > 3 and shape[-1] == shape[-2]:
        return 0.0  # scores of pairs of positions
    return math.prod(shape) * memory.itemsize(var.aval.dtype)
