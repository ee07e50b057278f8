"""Reads and writes checkpoints in Hugging Face layout: config.json and safetensors files.

A model describes its keys once, as a list of rules that serve both directions. Reading is complete
both ways: every key of the file is used or listed as ignored, every parameter is filled exactly
once, and all problems are reported together.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from unime_jax.types import Array, Params, UserError, flatten, unflatten

# Our axis i is the file's axis TRANSFORMS[name][i]; None keeps any number of axes as they are.
TRANSFORMS: dict[str, tuple[int, ...] | None] = {
    "same": None,
    "linear": (1, 0),  # [outputs, inputs] -> [inputs, outputs]
    "conv": (2, 3, 1, 0),  # OIHW -> HWIO; depthwise O1HW -> HW1O
}
SHARD_BYTES = 5 * 10**9
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHOWN = 8  # problems of one kind that a message spells out


@dataclasses.dataclass(frozen=True)
class Rule:
    """Ties a key of the file to a parameter.

    Attributes:
      hf: "model.layers.{L}.mlp.up_proj.weight"; {L} stands for the number of a stacked layer.
      ours: "language_model/model/layers/mlp/up_proj/kernel", whose first axis is L if hf has {L}.
      transform: a name of TRANSFORMS.
    """

    hf: str
    ours: str
    transform: str = "same"

    @property
    def stacked(self) -> bool:
        return "{L}" in self.hf


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """Is all that is known of a model's keys.

    Attributes:
      rules: one for every parameter.
      ignored: regexes (whole keys) of what a file may hold and the model does not use.
      renamed: (regex, replacement) pairs that turn other versions' keys into those of the rules.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: "KeyMap") -> "KeyMap":
        return KeyMap(
            self.rules + other.rules, self.ignored + other.ignored, self.renamed + other.renamed
        )


def read_config(directory) -> dict[str, Any]:
    """Reads config.json.

    Raises:
      UserError: it is missing, no JSON object, or has no model_type.
    """
    path = pathlib.Path(directory) / "config.json"
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} has no model_type; is this a model directory?")
    return config


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


class _Reader:
    """Is the key -> tensor view of all safetensors files of a directory; reads on demand."""

    def __init__(self, directory: pathlib.Path, key_map: KeyMap):
        self._files = {}
        self._names: dict[str, tuple[pathlib.Path, str]] = {}
        for path in _weight_files(directory):
            try:
                self._files[path] = safetensors.safe_open(path, framework="numpy")
                names = list(self._files[path].keys())
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is corrupt or cut short ({error}); fetch it again"
                ) from None
            for name in names:
                key = _renamed(name, key_map)
                if key in self._names:
                    raise UserError(f"{path}: {name} and {self._names[key][1]} are both {key}")
                self._names[key] = (path, name)

    def keys(self) -> set[str]:
        return set(self._names)

    def slice(self, key: str):
        """Returns the lazy tensor of a key: `.get_shape()`, `.get_dtype()`, `[slices]`."""
        path, name = self._names[key]
        return self._files[path].get_slice(name)


def _renamed(name: str, key_map: KeyMap) -> str:
    for pattern, replacement in key_map.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if single.exists():
        return [single]
    if not index.exists():
        raise UserError(f"{directory} holds neither {single.name} nor {index.name}")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map")
    paths = [directory / name for name in sorted(set(names.values()))]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise UserError(f"{directory} lacks {', '.join(missing)}, which {index.name} names")
    return paths


def load(directory, key_map: KeyMap, abstract: Params) -> Params:
    """Fills a model's parameters from a directory, one at a time.

    The host holds no more than the parts of one parameter that its devices need.

    Args:
      directory: holds model.safetensors, or several files and model.safetensors.index.json.
      key_map: the model's keys.
      abstract: nested dict of ShapeDtypeStruct; values are converted to its dtypes and placed on
        its shardings where it has any.

    Raises:
      UserError: a file is missing or corrupt, keys are missing, unknown or of another shape.
    """
    directory = pathlib.Path(directory)
    flat = flatten(abstract)
    reader = _Reader(directory, key_map)
    _check(reader, key_map, flat, directory)
    rules = {rule.ours: rule for rule in key_map.rules}
    return unflatten({path: _read(reader, rules[path], leaf) for path, leaf in flat.items()})


def _keys(rule: Rule, shape: tuple[int, ...]) -> list[str]:
    if not rule.stacked:
        return [rule.hf]
    return [rule.hf.replace("{L}", str(layer)) for layer in range(shape[0])]


def _check(reader: _Reader, key_map: KeyMap, flat: Mapping[str, Any], directory) -> None:
    """Raises one error that lists everything that does not fit."""
    ours = [rule.ours for rule in key_map.rules]
    absent = sorted(set(flat) - set(ours)) + sorted(set(ours) - set(flat))
    twice = sorted({path for path in ours if ours.count(path) > 1})
    if absent or twice:  # a fault of the model's table, not of the file
        raise ValueError(f"key rules do not fit the model: {absent} absent, {twice} given twice")
    have = reader.keys()
    missing, wrong, used = [], [], set()
    for rule in key_map.rules:
        leaf = flat[rule.ours]
        shape = leaf.shape[1:] if rule.stacked else leaf.shape
        expected = _in_file(rule, shape)
        for key in _keys(rule, leaf.shape):
            if key not in have:
                missing.append(key)
                continue
            used.add(key)
            tensor = reader.slice(key)
            if tuple(tensor.get_shape()) != expected:
                wrong.append(f"{key} is {tuple(tensor.get_shape())} instead of {expected}")
            elif tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                wrong.append(f"{key} is stored as {tensor.get_dtype()}, not as floats")
    unknown = sorted(
        key
        for key in have - used
        if not any(re.fullmatch(pattern, key) for pattern in key_map.ignored)
    )
    problems = [
        _listed("missing", missing),
        _listed("unknown", unknown),
        _listed("unfit", wrong),
    ]
    if any(problems):
        text = "; ".join(problem for problem in problems if problem)
        raise UserError(f"{directory}: the weights do not fit config.json: {text}")


def _listed(kind: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {kind}: {', '.join(items[:_SHOWN])}{more}"


def _in_file(rule: Rule, shape: tuple) -> tuple:
    """Puts what is said of each of our axes (a size, a slice) into the file's order."""
    order = TRANSFORMS[rule.transform]
    if order is None:
        return tuple(shape)
    turned = [None] * len(order)
    for ours, theirs in enumerate(order):
        turned[theirs] = shape[ours]
    return tuple(turned)


def _read(reader: _Reader, rule: Rule, leaf: jax.ShapeDtypeStruct) -> Array:
    dtype = np.dtype(leaf.dtype)

    def one(key: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = reader.slice(key)
        value = tensor[_in_file(rule, index)] if index else tensor[...]
        order = TRANSFORMS[rule.transform]
        return value if order is None else value.transpose(order)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
        if not rule.stacked:
            return np.ascontiguousarray(one(rule.hf, index).astype(dtype, copy=False))
        layers = range(index[0].start, index[0].stop)
        out = np.empty((len(layers), *(s.stop - s.start for s in index[1:])), dtype)
        for row, layer in enumerate(layers):
            out[row] = one(rule.hf.replace("{L}", str(layer)), index[1:])
        return out

    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jnp.asarray(part(tuple(slice(0, n) for n in leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, part)


def exported(params: Params, key_map: KeyMap, dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the file's keys and tensors, one at a time.

    Raises:
      UserError: a parameter has no key in this layout.
    """
    flat = flatten(params)
    rules = {rule.ours: rule for rule in key_map.rules}
    unknown = sorted(set(flat) - set(rules))
    if unknown:
        hint = "; merge adapters first" if any("/lora_" in path for path in unknown) else ""
        raise UserError(f"cannot be exported{hint}: {', '.join(unknown[:_SHOWN])}")
    for path, rule in rules.items():
        leaf = flat[path]
        for layer, key in enumerate(_keys(rule, leaf.shape)):
            value = np.asarray(leaf[layer] if rule.stacked else leaf).astype(jnp.dtype(dtype))
            order = TRANSFORMS[rule.transform]
            if order is not None:
                value = value.transpose(np.argsort(order))
            yield key, np.ascontiguousarray(value)


class _Writer:
    """Collects tensors into files of limited size; `finish` gives them their names at last."""

    def __init__(self, directory: pathlib.Path, shard_bytes: int):
        self._directory = directory
        self._limit = shard_bytes
        self._part: dict[str, np.ndarray] = {}
        self._size = self._total = 0
        self._written: list[tuple[pathlib.Path, list[str]]] = []

    def add(self, key: str, value: np.ndarray) -> None:
        if self._part and self._size + value.nbytes > self._limit:
            self._flush()
        self._part[key] = value
        self._size += value.nbytes

    def _flush(self) -> None:
        path = self._directory / f".part-{len(self._written)}.safetensors"
        # transformers refuses files without this note.
        safetensors.numpy.save_file(self._part, path, metadata={"format": "pt"})
        self._written.append((path, list(self._part)))
        self._total += self._size
        self._part, self._size = {}, 0

    def finish(self) -> None:
        """Renames the finished files, so that a torn write never looks like a checkpoint."""
        self._flush()
        count = len(self._written)
        if count == 1:
            os.replace(self._written[0][0], self._directory / SINGLE_FILE)
            return
        weight_map = {}
        for number, (path, keys) in enumerate(self._written, start=1):
            name = f"model-{number:05}-of-{count:05}.safetensors"
            os.replace(path, self._directory / name)
            weight_map.update(dict.fromkeys(keys, name))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (self._directory / INDEX_FILE).write_text(text, encoding="utf-8")


def save(
    directory,
    params: Params,
    key_map: KeyMap,
    config: Mapping[str, Any],
    dtype=jnp.float32,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and the weights; more than `shard_bytes` are spread over several files.

    Raises:
      UserError: a parameter has no key in this layout (adapters: merge them first), or writing
        fails.
    """
    directory = pathlib.Path(directory)
    writer = _Writer(directory, shard_bytes)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for key, value in exported(params, key_map, dtype):
            writer.add(key, value)
        writer.finish()
        text = json.dumps({**config, "dtype": jnp.dtype(dtype).name}, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory} cannot be written: {error}") from None
