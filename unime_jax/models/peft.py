"""Low-rank adapters in PEFT's file format: read, written, and merged into a model's tensors.

An adapter speaks of tensors by the checkpoint's keys and in its layout ([outputs, inputs]), so it
fits the same model whichever way that is held. Merging is done in f32, tensor by tensor, while they
are read: the result is rounded once, to whatever it is read into.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from unime_jax.models import hf, peft_config
from unime_jax.models.hf import KeyMap, Source, Tensor
from unime_jax.types import UserError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?")


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Changes a weight W [O, I] to W + scale * b @ a.

    Attributes:
      a, b: f32[R, I] and f32[O, R].
      magnitude: f32[O] or None; the changed rows are then scaled to these lengths (DoRA, Liu et al.
        2024, equation 5).
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Is what a training changed.

    Attributes:
      name: of the directory it comes from, for messages.
      low_rank: by the key of the weight.
      replaced: tensors that were trained as a whole, by key, in the file's layout.
      dropout: rate on the adapters' input in training.
    """

    name: str
    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, np.ndarray]
    dropout: float = 0.0


def merge(tensor: Tensor, change: LowRank) -> "_Merged":
    """Returns the changed weight, computed in f32 when it is read."""
    return _Merged(tensor, change)


class _Merged:
    def __init__(self, base: Tensor, change: LowRank):
        self._base, self._change = base, change

    def get_shape(self) -> Sequence[int]:
        return self._base.get_shape()

    def get_dtype(self) -> str:
        return self._base.get_dtype()

    def __getitem__(self, index) -> np.ndarray:
        rows, columns = (slice(None), slice(None)) if index is ... else index
        value = self._sum(rows, columns)
        if self._change.magnitude is None:
            return value
        whole = value.shape[1] == self.get_shape()[1]
        norm = np.linalg.norm(value if whole else self._sum(rows, slice(None)), axis=1)
        return value * (self._change.magnitude[rows] / norm)[:, None]

    def _sum(self, rows: slice, columns: slice) -> np.ndarray:
        change = self._change
        delta = change.b[rows] @ change.a[:, columns]
        delta *= np.float32(change.scale)
        delta += self._base[rows, columns].astype(np.float32)
        return delta


class Held:
    """Is a tensor that is held as an array."""

    def __init__(self, value: np.ndarray, dtype: str):
        self._value, self._dtype = value, dtype

    def get_shape(self) -> Sequence[int]:
        return self._value.shape

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, index) -> np.ndarray:
        return self._value[index]


class Adapted:
    """Is the source of a model with an adapter merged in.

    Raises:
      UserError: the adapter changes what the model does not have.
    """

    def __init__(self, base: Source, adapter: Adapter, key_map: KeyMap):
        self.name = base.name
        self._base, self._adapter = base, adapter
        self._originals = dict(key_map.copies)
        have = base.keys()
        shapes = {key: (x.b.shape[0], x.a.shape[1]) for key, x in adapter.low_rank.items()}
        shapes |= {key: x.shape for key, x in adapter.replaced.items()}
        missing = sorted(set(shapes) - have)
        unfit = [
            f"{key} is {theirs} instead of {shape}"
            for key, shape in shapes.items()
            if key in have and (theirs := tuple(base.slice(key).get_shape())) != shape
        ]
        if missing or unfit:
            problems = [hf.listed("missing", missing), hf.listed("unfit", unfit)]
            raise UserError(
                f"{adapter.name} is no adapter of {base.name}: weights that it changes are "
                + "; ".join(filter(None, problems))
            )

    def keys(self) -> set[str]:
        return self._base.keys()

    def slice(self, key: str) -> Tensor:
        tensor = self._base.slice(key)
        key = self._originals.get(key, key)
        if key in self._adapter.replaced:
            tensor = Held(self._adapter.replaced[key], tensor.get_dtype())
        if key in self._adapter.low_rank:
            tensor = merge(tensor, self._adapter.low_rank[key])
        return tensor


def join(first: Adapter, second: Adapter) -> Adapter:
    """Returns the adapter that does what the two do one after the other; ranks add up.

    Raises:
      UserError: a DoRA adapter is among them.
    """
    low_rank, replaced = dict(first.low_rank), {**first.replaced, **second.replaced}
    for key in second.replaced:
        low_rank.pop(key, None)
    for key, change in second.low_rank.items():
        if key in first.replaced and key not in second.replaced:
            replaced[key] = merge(Held(first.replaced[key], "F32"), change)[...]
        elif key not in low_rank:
            low_rank[key] = change
        else:
            low_rank[key] = _sum(low_rank[key], change, second.name)
    return Adapter(second.name, low_rank, replaced, second.dropout)


def _sum(first: LowRank, second: LowRank, name: str) -> LowRank:
    if first.magnitude is not None or second.magnitude is not None:
        raise UserError(f"{name}: a DoRA adapter is among those to be joined; export the model")
    scaled = [(x.b * np.float32(x.scale)) for x in (first, second)]
    return LowRank(np.concatenate([first.a, second.a]), np.concatenate(scaled, axis=1), 1.0)


def is_adapter(directory) -> bool:
    return (pathlib.Path(directory) / CONFIG_FILE).is_file()


def base_of(directory) -> str:
    """Returns the name or path of the model that an adapter belongs to.

    Raises:
      UserError: the adapter does not say.
    """
    base = hf.read_json(pathlib.Path(directory) / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{directory}/{CONFIG_FILE} names no base_model_name_or_path; give the base as the "
            "model and this directory as the adapter"
        )
    return base


def read(directory, key_map: KeyMap) -> Adapter:
    """Reads an adapter: LoRA or DoRA, with modules that were saved whole.

    Args:
      directory: adapter_config.json and adapter_model.safetensors.
      key_map: of the model it belongs to.

    Raises:
      UserError: a file is missing, or something in it is not understood; all of it is named.
    """
    directory = pathlib.Path(directory)
    config = hf.read_json(directory / CONFIG_FILE)
    problems = peft_config.unsupported(config)
    if problems:
        raise UserError(f"{directory}/{CONFIG_FILE}: not supported: {', '.join(problems)}")
    parts: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    replaced: dict[str, np.ndarray] = {}
    tensors = _tensors(directory)
    for name, value in tensors.items():
        inner = name.removeprefix(_PREFIX)
        match = _LORA.fullmatch(inner)
        if match:
            parts[match[1]][match[2]] = value
        elif inner == name or "lora_" in inner or ".base_layer." in inner:
            problems.append(f"{name} is not understood")
        else:
            key = re.sub(r"\.modules_to_save(\.default)?\.", ".", inner)
            replaced[hf.renamed(key, key_map)] = value
    low_rank = {}
    for module, arrays in parts.items():
        problem = _misfit(config, module, arrays)
        if problem:
            problems.append(f"{module} {problem}")
            continue
        change = _low_rank(config, module, arrays)
        low_rank[hf.renamed(f"{module}.weight", key_map)] = change
    for module in config.get("modules_to_save") or []:
        if not any(f"{module}." in name for name in tensors):
            problems.append(f"modules_to_save names {module}, whose weights are not there")
    if problems:
        raise UserError(f"{directory}/{WEIGHTS_FILE}: " + hf.listed("problem(s)", problems))
    return Adapter(str(directory), low_rank, replaced, config.get("lora_dropout") or 0.0)


def _tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin may run code when read: convert it with peft" if pickled else ""
        raise UserError(f"{path} is missing{hint}")
    try:
        found = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt or cut short ({error}); fetch it again") from None
    except (ValueError, TypeError, KeyError) as error:  # of a dtype that numpy does not have
        raise UserError(f"{path}: holds what numpy cannot ({error}); save it in f32") from None
    if not found:  # a common fault of saving what is spread over devices
        raise UserError(f"{path} holds no tensors; save the adapter again")
    return {name: value.astype(np.float32) for name, value in found.items()}


def _misfit(config: Mapping[str, Any], module: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Returns what is wrong with a module's arrays, or ""."""
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    if set(arrays) != wanted:
        return f"has {', '.join(sorted(arrays))} instead of {', '.join(sorted(wanted))}"
    a, b = arrays["lora_A"], arrays["lora_B"]
    rank = peft_config.of_module(config.get("rank_pattern"), module, config["r"])
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return f"has arrays {a.shape} and {b.shape}, not a linear layer's of rank {rank}"
    magnitude = arrays.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.size != b.shape[0]:
        return f"has {magnitude.size} magnitudes for {b.shape[0]} outputs"
    return ""


def _low_rank(config: Mapping[str, Any], module: str, arrays: Mapping[str, np.ndarray]) -> LowRank:
    a, b = arrays["lora_A"], arrays["lora_B"]
    rank = a.shape[0]
    alpha = peft_config.of_module(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    magnitude = arrays.get("lora_magnitude_vector")
    return LowRank(a, b, scale, None if magnitude is None else magnitude.reshape(-1))


def write(directory, adapter: Adapter, base: Source, *, base_name: str, key_map: KeyMap) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, f32.

    Args:
      directory: exists.
      adapter: of `base`; tensors trained as a whole become PEFT's `modules_to_save`.
      base: where the other parameters of such modules are taken from.
      base_name: the path or hub id of the model.
      key_map: of the model.

    Raises:
      UserError: something was trained that the format cannot hold.
    """
    directory = pathlib.Path(directory)
    tensors: dict[str, np.ndarray] = {}
    low_rank = {_module(key, key_map): change for key, change in adapter.low_rank.items()}
    for module, change in low_rank.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = change.a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = change.b
        if change.magnitude is not None:
            tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = change.magnitude
    saved = _saved_modules(adapter, base, key_map)
    for key, value in saved.items():
        name = key.rsplit(".", 1)[-1]
        tensors[f"{_PREFIX}{_module(key, key_map)}.{name}"] = value
    ranks = {module: (x.a.shape[0], x.scale * x.a.shape[0]) for module, x in low_rank.items()}
    (rank, alpha), _ = collections.Counter(ranks.values()).most_common(1)[0]
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(alpha),
        "lora_dropout": adapter.dropout,
        "modules_to_save": sorted({_module(key, key_map) for key in saved}) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(m): r for m, (r, _) in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(m): _number(a) for m, (_, a) in ranks.items() if a != alpha},
        # Whole names: a suffix such as q_proj would hit the vision tower as well.
        "target_modules": sorted(low_rank),
        "task_type": None,
        "use_dora": any(change.magnitude is not None for change in low_rank.values()),
        "use_rslora": False,
    }
    contiguous = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    safetensors.numpy.save_file(contiguous, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")


def _saved_modules(adapter: Adapter, base: Source, key_map: KeyMap) -> dict[str, np.ndarray]:
    """Returns every parameter of the modules of which one was trained as a whole."""
    bare = sorted(key for key in adapter.replaced if not key.endswith((".weight", ".bias")))
    modules = {key.rsplit(".", 1)[0] for key in adapter.replaced}
    both = sorted(modules & {key.rsplit(".", 1)[0] for key in adapter.low_rank})
    for found, why in ((bare, "belong to no module"), (both, "have an adapter and were trained")):
        if found:
            raise UserError(
                f"{adapter.name}: PEFT's format cannot hold {', '.join(found[:3])}, which {why}; "
                "export the merged model instead"
            )
    keys = {f"{module}.{name}" for module in modules for name in ("weight", "bias")}
    source = Adapted(base, Adapter(adapter.name, {}, adapter.replaced), key_map)
    return {key: source.slice(key)[...] for key in sorted(keys & source.keys())}


def _module(key: str, key_map: KeyMap) -> str:
    """Returns the name that transformers gives the module of a key."""
    for pattern, replacement in key_map.modules:
        key = re.sub(pattern, replacement, key)
    return key.rsplit(".", 1)[0]


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
