"""Reads adapter_config.json of PEFT, and says what of it is not built."""

import math
import re
from collections.abc import Mapping
from typing import Any

# Keys of adapter_config.json that say nothing about what the weights mean.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
_READ = {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "use_dora", "use_rslora"}
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, ...) store adapters for a
# base that they have changed.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# What keeps a search short: (sign, how many of it a pattern may have), escapes left out.
_LIMITS = (
    (r"\)[*+?{]", 0),
    (r"[*+{]", 3),
    (r"(?<!\()\?", 6),
    (r"\(", 8),
    (r"\|", 64),
    (r".", 1000),
)


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """Returns what adapter_config.json asks for and is not built."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type {config.get('peft_type')!r}, only 'LORA'"]
    known = _HARMLESS | _READ | {"bias", "init_lora_weights"}
    found = [f"{key} = {value!r}" for key, value in config.items() if key not in known and value]
    if config.get("bias", "none") != "none":
        found.append(f"bias = {config['bias']!r}")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        found.append(f"init_lora_weights = {start!r}, which changes the base")
    found += [
        f"{key} = {config.get(key)!r}"
        for key, good in (
            ("r", _is_rank(config.get("r"))),
            ("lora_alpha", _is_number(config.get("lora_alpha"))),
            ("lora_dropout", _is_share(config.get("lora_dropout") or 0)),
            ("modules_to_save", _is_names(config.get("modules_to_save"))),
            ("use_rslora", isinstance(config.get("use_rslora"), bool | None)),
            ("use_dora", isinstance(config.get("use_dora"), bool | None)),
        )
        if not good
    ]
    for key, good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        values = config.get(key) or {}
        if not isinstance(values, dict) or not all(map(good, values.values())):
            found.append(f"{key} = {values!r}")
        else:
            found += [f"{key} with {name!r}: {why}" for name in values if (why := _unsafe(name))]
    return found


def of_module(patterns: Mapping[str, Any] | None, module: str, default):
    """Returns a module's own value: of the first pattern that its name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e9
        and math.isfinite(value)
    )


def _is_rank(value: Any) -> bool:
    return _is_number(value) and value > 0 and value == int(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _unsafe(pattern: str) -> str:
    """Returns why a pattern of someone else's file is not searched with, "" if it is.

    Patterns of peft are names of modules with a few wildcards; others can take for ever.
    """
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        return f"no regular expression ({error})"
    plain = re.sub(r"\\.", "", pattern)
    if any(len(re.findall(sign, plain)) > most for sign, most in _LIMITS):
        return "too involved a regular expression"
    return ""
