"""Counts the floating-point operations of a program from its jaxpr.

XLA's own count takes the body of a loop once, however often it runs; here a scan's body counts
`length` times. Products and convolutions are counted, 2 M N K each; everything else is below one
percent of a transformer and is left out. The program is the differentiated one, so what is computed
again on the way back is in it, under the name that `jax.checkpoint` gives it.

Attention counts as the products of all queries with all keys, as is the custom, whatever computes
it: nobody sees into a kernel, and what a causal mask hides is computed by some and not by others.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from unime_jax.models.attention import without_kernels

PARTS = ("decoder", "vision", "loss", "other")
_AGAIN = "rematted_computation"


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one step over all rows.

    Attributes:
      parts: of decoder, vision (tower and projector), loss and other, without what is computed
        again.
      again: of the same parts, what is computed again on the way back (`jax.checkpoint`).
    """

    parts: dict[str, float]
    again: dict[str, float]

    @property
    def model(self) -> float:
        """Is what the mathematics needs: no operation counted twice."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        return self.model + sum(self.again.values())


def count(function, *arguments) -> Flops:
    """Counts the operations of `function(*arguments)`; arguments may be shapes."""
    return count_jaxpr(trace(function, *arguments)[0])


def trace(function, *arguments, whole: bool = True) -> tuple[Any, list[bool]]:
    """Returns the jaxpr of `function(*arguments)` without what nobody uses.

    The second is which leaves of the arguments are used: `jax.jit` passes these alone.

    Args:
      function, arguments: see `count`.
      whole: attention as it is counted; else as the function computes it.
    """
    if whole and hasattr(function, "lower"):  # jit would keep this trace for who runs the function
        function = getattr(function, "__wrapped__", function)
    with without_kernels() if whole else contextlib.nullcontext():
        jaxpr = jax.make_jaxpr(lambda *args: function(*args))(*arguments).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))


def count_jaxpr(jaxpr) -> Flops:
    found: collections.Counter[tuple[str, bool]] = collections.Counter()
    _add(jaxpr, 1.0, "other", False, found)
    return Flops(
        {part: float(found[part, False]) for part in PARTS},
        {part: float(found[part, True]) for part in PARTS},
    )


def bodies(equation) -> Iterator[tuple[Any, float]]:
    """Yields the jaxprs inside an equation, with how often each runs.

    Raises:
      NotImplementedError: a `while` loop with products in it: nobody knows how often it runs.
    """
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        yield params["jaxpr"].jaxpr, params["length"]
    elif name == "while":
        # Random numbers are drawn in such loops; a product there has no known count.
        for key in ("cond_jaxpr", "body_jaxpr"):
            if _has_products(params[key].jaxpr):
                raise NotImplementedError("a while loop with products: trip count unknown")
    elif name == "cond":  # the dearest branch
        yield max((branch.jaxpr for branch in params["branches"]), key=_cost), 1.0
    elif name == "shard_map":
        # The body is what one device does.
        yield _open(params["jaxpr"]), math.prod(params["mesh"].shape.values())
    else:
        for value in params.values():
            if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
                yield _open(value), 1.0


def _open(jaxpr):
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _add(jaxpr, times: float, part: str, again: bool, found) -> None:
    for equation in jaxpr.eqns:
        stack = str(equation.source_info.name_stack)
        inner_part = next((p for p in PARTS if p in stack), part)
        inner_again = again or _AGAIN in stack
        cost = _products(equation)
        if cost:
            found[inner_part, inner_again] += times * cost
            continue
        for body, runs in bodies(equation):
            _add(body, times * runs, inner_part, inner_again, found)


def _cost(jaxpr) -> float:
    found: collections.Counter = collections.Counter()
    _add(jaxpr, 1.0, "other", False, found)
    return float(sum(found.values()))


def _has_products(jaxpr) -> bool:
    return any(
        _products(equation) or any(_has_products(body) for body, _ in bodies(equation))
        for equation in jaxpr.eqns
    )


def _products(equation) -> float:
    """Returns 2 M N K of a product or a convolution, 0 of anything else."""
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        inner = math.prod(shape[axis] for axis in contracted)
        return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_axis = equation.params["dimension_numbers"].rhs_spec[0]
        inner = math.prod(kernel) / kernel[out_axis]
        return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
    return 0.0
