"""Searches the fastest values of chunk and remat that fit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from unime_jax.planning import estimate, page

_MOST_COMPILES = 4  # each takes a minute or more
_OPTIMISM = 0.6  # an estimate this much too high would still be tried

Setting = tuple[int, str]  # chunk, remat


def candidates(
    estimator: estimate.Estimator, arguments: float, given: Setting
) -> list[dict[str, Any]]:
    """Estimates all settings that are worth it, the fastest first.

    Args:
      estimator: of the step.
      arguments: bytes of the step's arguments.
      given: of the configuration, always among them.
    """
    settings = []
    for remat in estimate.REMATS:
        for chunk in estimator.chunks():
            if chunk or (0, remat) == given or _whole_may_fit(estimator, arguments, remat):
                settings.append(estimator.setting(chunk, remat))
    # Of equal ones the larger chunk: fewer gathers. 0 is the largest of all.
    settings.sort(key=lambda one: (one.seconds, -(one.chunk or np.inf)))
    return [dataclasses.asdict(one) for one in settings]


def _whole_may_fit(estimator: estimate.Estimator, arguments: float, remat: str) -> bool:
    """Says whether a probe of the batch without chunks is worth its time."""
    chunked = estimator.probe(remat, True)
    rows = estimator.rows_alive(0)
    return arguments + _OPTIMISM * chunked.temporaries(rows) < estimator.limit


def compile_in_turn(
    found: list[dict[str, Any]],
    attempt: Callable[[Setting], dict[str, Any]],
    *,
    base: float,
    limit: float,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Compiles the fastest until one fits, and the smallest if none of them did.

    Args:
      found: candidates.
      attempt: compiles a setting; returns its `peak` in bytes, whether it `fits`, and more.
      base: bytes of the step's arguments.
      limit: bytes that a peak may have.
      tell: gets a line for each that was compiled.

    Returns:
      Those that were compiled, each with what `attempt` returned.
    """
    tried: list[dict[str, Any]] = []
    ratio: dict[str, float] = {}  # of compiled and estimated temporaries, by remat
    if base > limit:
        return tried

    def fits(one: dict[str, Any]) -> bool:
        result = attempt(_setting(one))
        tried.append({**one, "fits": result["fits"], "compiled": result})
        tell(page.tried(result))
        if np.isfinite(result["peak"]):
            ratio[one["remat"]] = (result["peak"] - base) / max(one["peak"] - base, 1.0)
        return result["fits"]

    for one in found:
        expected = base + (one["peak"] - base) * ratio.get(one["remat"], _OPTIMISM)
        if expected <= limit and (len(tried) == _MOST_COMPILES or fits(one)):
            break
    smallest = min(found, key=lambda one: one["peak"])
    settings = list(map(_setting, tried))
    if not any(one["fits"] for one in tried) and _setting(smallest) not in settings:
        fits(smallest)
    return tried


def _setting(found: dict[str, Any]) -> Setting:
    return found["chunk"], found["remat"]
