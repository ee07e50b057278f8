"""What values of a training run's configuration look like, whatever they mean."""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

_STRINGS = ("data.sets", "data.directions", "train.trainable")
_PAIRS = {"data.weights": "set", "optim.multipliers": "regex"}
_PATTERNS = ("train.adapters.targets", "train.trainable", "optim.multipliers")
_ENDLESS = ("data.temperature", "loss.margin")  # may be inf: equal shares, nothing filtered
_SEEDS = 2**31


def problem(settings: dict[str, Any]) -> str:
    """Returns what is wrong with the first value that no run could use, "" if all look right.

    Args:
      settings: nested dicts.
    """
    return next(_problems(dict(_leaves(settings))), "")


def misnamed(settings: dict[str, Any], known: Sequence[str]) -> str:
    """Returns which key is none of the known ones or is missing, "" if all are as they should be.

    Args:
      settings: nested dicts.
      known: "key", "section.key", or "section" whose keys have any names.
    """
    found = [key for key, _ in _leaves(settings)]
    for key in found:
        if not any(key == name or key.startswith(f"{name}.") for name in known):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean config.{near[0]}?" if near else ""
            return f"config.{key}: no such key{hint}"
    for name in known:
        if name not in settings and not any(f"{key}.".startswith(f"{name}.") for key in found):
            return f"config.{name} is missing"
    return ""


def split(value: Any) -> Any:
    """Splits strings of a tuple at commas, each part once: as a flag it may come as one string."""
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        return value
    parts = (part.strip() for item in value for part in item.split(","))
    return tuple(dict.fromkeys(filter(None, parts)))


def _problems(flat: dict[str, Any]) -> Iterator[str]:
    for key in _STRINGS:
        value = flat.get(key, ())
        if not _is_list(value) or not all(isinstance(item, str) for item in value):
            yield f"config.{key}={value!r}: give a list of strings"
    for key, name in _PAIRS.items():
        value = flat.get(key, ())
        if not _is_list(value) or not all(map(_is_pair, value)):
            yield f'config.{key}={value!r}: give a list of ("{name}", number of at least 0)'
    for key in _PATTERNS:
        value = flat.get(key, ())
        for item in [value] if isinstance(value, str) else value:
            if reason := _misfit(item if isinstance(item, str) else item[0]):
                yield f"config.{key}={value!r}: no regular expression ({reason})"
    for key, value in flat.items():
        endless = key in _ENDLESS and value == math.inf
        if isinstance(value, float) and not math.isfinite(value) and not endless:
            yield f"config.{key}={value}: give a finite number"
    for key in ("optim.b1", "optim.b2"):
        if not 0 <= flat.get(key, 0) < 1:
            yield f"config.{key}={flat[key]}: give a number from 0 to below 1"
    if not 0 <= flat.get("seed", 0) < _SEEDS:
        yield f"config.seed={flat['seed']}: give one from 0 to {_SEEDS - 1}"


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_pair(value: Any) -> bool:
    good = _is_list(value) and len(value) == 2 and isinstance(value[0], str)
    return good and type(value[1]) in (int, float) and 0 <= value[1] < math.inf


def _misfit(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return ""
