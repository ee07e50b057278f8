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
_AT_LEAST_1 = (
    *("train.steps", "train.batch_size", "data.max_tokens", "data.variants"),
    *("data.threads", "checkpoint.keep", "log.every_steps", "optim.spike_window"),
)
LENGTH_BINS = 8  # at most
_ABOVE_0 = ("loss.temperature", "optim.learning_rate", "data.temperature")
_NOT_NEGATIVE = (
    *("loss.k", "train.chunk", "train.adapters.rank", "train.epochs", "train.replay"),
    *("optim.warmup_steps", "optim.clip_norm", "optim.weight_decay"),
    *("checkpoint.every_steps", "checkpoint.every_seconds", "checkpoint.keep_best"),
    *("eval.every_steps", "data.image_size", "data.image_crops", "data.set_rows", "data.block"),
    "data.workers",
)
_SHARES = (
    *("train.adapters.dropout", "train.feature_dropout", "optim.warmup_share"),
    *("data.extra_texts", "data.max_bad_share"),
)
_SHOWN = 5  # missing keys are named, up to so many
_KINDS = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    tuple: "a list",
}


def problem(settings: dict[str, Any]) -> str:
    """Returns what is wrong with the first value that no run could use, "" if all look right.

    Args:
      settings: nested dicts.
    """
    return next(_problems(dict(_leaves(settings))), "")


def misnamed(settings: dict[str, Any], known: Sequence[str], optional: tuple[str, ...] = ()) -> str:
    """Returns which key is none of the known ones, is missing or None, "" if all are sound.

    Args:
      settings: nested dicts.
      known: "key", "section.key", or "section" whose keys have any names.
      optional: what keys begin with that may be "".
    """
    values = dict(_leaves(settings))
    for key in values:
        if not any(key == name or key.startswith(f"{name}.") for name in known):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean config.{near[0]}?" if near else ""
            return f"config.{key}: no such key{hint}"
    for name in known:
        if name not in settings and not any(f"{key}.".startswith(f"{name}.") for key in values):
            return f"config.{name} is missing"
    ways = {key: 'give "" to leave it out' if key.startswith(optional) else "give a value"
            for key in values if values[key] is None}  # fmt: skip
    return next((f"config.{key}=None: {way}" for key, way in ways.items()), "")


def nothings(settings: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """Yields the keys that are None where no value is "", as configurations of old have it."""
    defaults = dict(_leaves(known))
    return (key for key, value in _leaves(settings) if value is None and defaults.get(key) == "")


def unlike(settings: dict[str, Any], known: dict[str, Any], name: str = "config") -> str:
    """Returns which key is new, missing or has a value of another kind, "" if none is.

    Args:
      settings: nested dicts.
      known: nested dicts with every key; a value of None stands for any.
      name: of the settings.
    """
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {name}.{near[0]}?" if near else ""
            return f"{name}.{key}: no such key{hint}"
    if missing := [key for key in known if key not in settings]:
        place = f"{name}.{next(iter(settings), missing[0])}".removeprefix("config")
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        return (
            f"{name} lacks {', '.join(missing[:_SHOWN])}{more}: set keys one by one "
            f"(--config{place}=VALUE; in a file c{place} = VALUE), do not replace the whole"
        )
    return next(
        filter(None, (_other_kind(settings[k], known[k], f"{name}.{k}") for k in known)), ""
    )


def _other_kind(value: Any, like: Any, name: str) -> str:
    """Returns what is wrong with a value that is to be of the kind of another, or ""."""
    if isinstance(like, dict) and isinstance(value, dict):
        return unlike(value, like, name)
    if isinstance(like, dict):
        return f"{name}={value!r}: is a section; set its keys one by one"
    kind = type(like)
    kinds = {float: (int, float), tuple: (list, tuple)}.get(kind, kind)
    fits = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
    return "" if like is None or fits else f"{name}={value!r}: give {_KINDS[kind]}"


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
    for keys, fits, said in (
        (_AT_LEAST_1, lambda value: value >= 1, "must be at least 1"),
        (_ABOVE_0, lambda value: value > 0, "must be above 0"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
        (_SHARES, lambda value: 0 <= value < 1, "must be in [0, 1)"),
        (
            ("data.length_bins",),
            lambda value: 1 <= value <= LENGTH_BINS,
            f"must be from 1 to {LENGTH_BINS}",
        ),
    ):
        for key in keys:
            if key in flat and not fits(flat[key]):
                yield f"config.{key}={flat[key]}: {said}"
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
