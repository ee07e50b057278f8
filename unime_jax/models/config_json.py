"""Values of config.json, checked before they become shapes."""

import math
from collections.abc import Mapping
from typing import Any

from unime_jax.types import UserError

# What a model's sizes stay below: larger ones come from damaged files, and take for ever.
_SIZE, _LAYERS = 2**28, 10_000


def part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a nested object; {} where it is absent or null.

    Raises:
      UserError: something else stands there.
    """
    found = config.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"config.json: {name} = {found!r} must be an object")
    return found


def check_numbers(
    config: Mapping[str, Any],
    *,
    whole: tuple[str, ...] = (),
    real: tuple[str, ...] = (),
    optional: bool = False,
    where: str = "",
) -> None:
    """Checks values that become sizes or factors: positive numbers.

    Args:
      whole, real: keys of whole numbers and of others.
      optional: whether they may be absent or null.
      where: the object that they stand in, with a dot.

    Raises:
      UserError: names the first key that is absent or no such number.
    """
    for name in (*whole, *real):
        value = config.get(name)
        if value is None and optional:
            continue
        if value is None:
            raise UserError(f"config.json lacks {where}{name}")
        kinds = int if name in whole else (int, float)
        limit = _LAYERS if "layers" in name else _SIZE if name in whole else math.inf
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < limit:
            kind = "whole " if name in whole else ""
            raise UserError(
                f"config.json: {where}{name} = {value!r} must be a positive {kind}number"
            )


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the RoPE settings, wherever this version of transformers wrote them."""
    return {**config, **part(config, "rope_scaling"), **part(config, "rope_parameters")}


def refuse_unknown_mathematics(config: Mapping[str, Any]) -> None:
    """Checks what a decoder's configuration says beyond its sizes.

    Raises:
      UserError: a value that changes the mathematics in a way not built here.
    """
    settings = rope_settings(config)
    check_numbers(settings, real=("rope_theta",), optional=True)
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    expected = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "rope_scaling": (rope_type, "default"),
        "partial_rotary_factor": (settings.get("partial_rotary_factor", 1.0), 1.0),
        "quantization_config": (config.get("quantization_config"), None),
    }
    for name, (value, known) in expected.items():
        if value != known:
            raise UserError(f"config.json: {name} = {value!r} is not supported, only {known!r}")
