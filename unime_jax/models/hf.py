"""Keys of checkpoints in Hugging Face layout, and what they mean for a model's parameters.

A model describes its keys once, as a list of rules that serve both directions; `hf_read` and
`hf_write` know the files. Reading is complete both ways: every key of the file is used or listed as
ignored, every parameter is filled exactly once, and all problems are reported together.
"""

import dataclasses
import functools
import json
import pathlib
import re
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from unime_jax.models.host_arrays import aligned_empty, is_finite
from unime_jax.types import Array, Params, UserError, flatten, unflatten

# Our axis i is the file's axis TRANSFORMS[name][i]; None keeps any number of axes as they are.
TRANSFORMS: dict[str, tuple[int, ...] | None] = {
    "same": None,
    "linear": (1, 0),  # [outputs, inputs] -> [inputs, outputs]
    "conv": (2, 3, 1, 0),  # OIHW -> HWIO; depthwise O1HW -> HW1O
}
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
      copies: (copy, original) keys of the same tensor; a file may lack the copy, ours have it.
      modules: (regex, replacement) pairs that turn keys of the rules into names of transformers'
        modules, where these are called otherwise.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    modules: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: "KeyMap") -> "KeyMap":
        return KeyMap(
            self.rules + other.rules,
            self.ignored + other.ignored,
            self.renamed + other.renamed,
            self.copies + other.copies,
            self.modules + other.modules,
        )

    def only(self, paths: Container[str]) -> "KeyMap":
        """Returns the map of a model that has some of the parameters; other keys are ignored."""
        kept = tuple(rule for rule in self.rules if rule.ours in paths)
        others = tuple(
            re.escape(rule.hf).replace(re.escape("{L}"), r"\d+")
            for rule in self.rules
            if rule.ours not in paths
        )
        copies = tuple(re.escape(copy) for copy, _ in self.copies)
        return dataclasses.replace(
            self, rules=kept, ignored=self.ignored + others + copies, copies=()
        )


def read_config(directory) -> dict[str, Any]:
    """Reads config.json.

    Raises:
      UserError: it is missing, no JSON object, or has no model_type.
    """
    path = pathlib.Path(directory) / "config.json"
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} has no model_type; is this a model directory?")
    return config


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


@runtime_checkable
class Tensor(Protocol):
    """Is a tensor in the file's layout that is read when it is indexed, part by part."""

    def get_shape(self) -> Sequence[int]: ...

    def get_dtype(self) -> str:
        """Returns the dtype it is stored in, as safetensors spells it: "BF16"."""

    def __getitem__(self, index) -> np.ndarray: ...


@runtime_checkable
class Source(Protocol):
    """Is where tensors come from, by the keys of a model's rules.

    Attributes:
      name: of the directory, for messages.
    """

    name: str

    def keys(self) -> set[str]: ...

    def slice(self, key: str) -> Tensor: ...


def renamed(name: str, key_map: KeyMap) -> str:
    """Returns a file's key as the rules spell it."""
    for pattern, replacement in key_map.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def fill(
    source: Source,
    key_map: KeyMap,
    abstract: Params,
    *,
    finish: Callable[[str, Array], dict[str, Array]] | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Params:
    """Fills a model's parameters, one at a time, with tensors from anywhere.

    The host holds no more than the parts of one parameter that its devices need. NaN and infinite
    values are warned of.

    Args:
      source: the tensors.
      key_map: the model's keys.
      abstract: nested dict of ShapeDtypeStruct; values are converted to its dtypes and placed on
        its shardings where it has any.
      finish: (path, parameter) -> what is kept of it, by path, before the next one is read.
      progress: called with the bytes filled so far and the parameter that comes next.

    Raises:
      UserError: keys are missing, unknown or of another shape.
    """
    flat = flatten(abstract)
    check(source, key_map, flat)
    rules = {rule.ours: rule for rule in key_map.rules}
    broken: set[str] = set()
    filled, done = {}, 0
    for path, leaf in flat.items():
        if progress:
            progress(done, path)
        value = _read(source, rules[path], leaf, broken)
        done += value.nbytes
        filled.update(finish(path, value) if finish else {path: value})
    if broken:
        named = listed("tensors", sorted(broken))
        warnings.warn(f"{source.name}: NaN or infinite values in {named}", stacklevel=2)
    return unflatten(filled)


def keys_of(rule: Rule, shape: tuple[int, ...]) -> list[str]:
    """Returns the keys of a parameter of this shape, one for every layer."""
    if not rule.stacked:
        return [rule.hf]
    return [rule.hf.replace("{L}", str(layer)) for layer in range(shape[0])]


def check(source: Source, key_map: KeyMap, flat: Mapping[str, Any]) -> None:
    """Compares a file's keys, shapes and dtypes with a model's flat parameters, both ways.

    Raises:
      UserError: lists everything that does not fit.
    """
    ours = [rule.ours for rule in key_map.rules]
    absent = sorted(set(flat) - set(ours)) + sorted(set(ours) - set(flat))
    twice = sorted({path for path in ours if ours.count(path) > 1})
    if absent or twice:  # a fault of the model's table, not of the file
        raise ValueError(f"key rules do not fit the model: {absent} absent, {twice} given twice")
    have = source.keys()
    missing, wrong, used = [], [], set()
    for rule in key_map.rules:
        leaf = flat[rule.ours]
        shape = leaf.shape[1:] if rule.stacked else leaf.shape
        expected = in_file(rule, shape)
        for key in keys_of(rule, leaf.shape):
            if key not in have:
                missing.append(key)
                continue
            used.add(key)
            tensor = source.slice(key)
            if tuple(tensor.get_shape()) != expected:
                wrong.append(f"{key} is {tuple(tensor.get_shape())} instead of {expected}")
            elif tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                wrong.append(f"{key} is stored as {tensor.get_dtype()}, not as floats")
    for copy, original in key_map.copies:
        if copy in have and original in have:
            used.add(copy)
            if not _same(source.slice(copy)[...], source.slice(original)[...]):
                wrong.append(f"{copy} differs from {original}, whose copy it should be")
    unknown = sorted(
        key
        for key in have - used
        if not any(re.fullmatch(pattern, key) for pattern in key_map.ignored)
    )
    problems = [
        listed("missing", missing),
        listed("unknown", unknown),
        listed("unfit", wrong),
    ]
    if any(problems):
        text = "; ".join(problem for problem in problems if problem)
        raise UserError(f"{source.name}: the weights do not fit config.json: {text}")


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    """Compares values; NaN, which is warned of elsewhere, is the same as NaN."""
    if first.shape != second.shape:
        return False
    return bool(np.all((first == second) | ((first != first) & (second != second))))


def listed(kind: str, items: list[str]) -> str:
    """Returns "3 missing: a, b, c", cut where there are too many; "" for none."""
    if not items:
        return ""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {kind}: {', '.join(items[:_SHOWN])}{more}"


def in_file(rule: Rule, shape: tuple) -> tuple:
    """Puts what is said of each of our axes (a size, a slice) into the file's order."""
    order = TRANSFORMS[rule.transform]
    if order is None:
        return tuple(shape)
    turned = [None] * len(order)
    for ours, theirs in enumerate(order):
        turned[theirs] = shape[ours]
    return tuple(turned)


def _read(source: Source, rule: Rule, leaf: jax.ShapeDtypeStruct, broken: set[str]) -> Array:
    """Returns a filled parameter; keys of tensors with NaN or infinite values go into `broken`."""

    def one(key: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = source.slice(key)
        value = tensor[in_file(rule, index)] if index else tensor[...]
        if not is_finite(value):
            broken.add(key)
        return from_file(value, rule)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
        out = aligned_empty(tuple(s.stop - s.start for s in index), np.dtype(leaf.dtype))
        if rule.stacked:
            for row, layer in enumerate(range(index[0].start, index[0].stop)):
                out[row] = one(rule.hf.replace("{L}", str(layer)), index[1:])
        else:
            out[...] = one(rule.hf, index)
        return out

    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.device_put(part(tuple(slice(0, n) for n in leaf.shape)), may_alias=True)
    return jax.make_array_from_callback(leaf.shape, sharding, part)


def pending(
    params: Params, key_map: KeyMap, dtype
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Yields key and shape of every tensor of the file, and a function that returns it.

    Raises:
      UserError: a parameter has no key in this layout.
    """
    flat = flatten(params)
    rules = {rule.ours: rule for rule in key_map.rules}
    unknown = sorted(set(flat) - set(rules))
    if unknown:
        hint = "; merge adapters first" if any("/lora_" in path for path in unknown) else ""
        raise UserError(f"cannot be exported{hint}: {', '.join(unknown[:_SHOWN])}")

    def value(leaf, rule, layer):
        part = leaf[layer] if rule.stacked else leaf
        return to_file(np.asarray(part).astype(jnp.dtype(dtype)), rule)

    for path, rule in rules.items():
        leaf = flat[path]
        shape = in_file(rule, leaf.shape[1:] if rule.stacked else leaf.shape)
        for layer, key in enumerate(keys_of(rule, leaf.shape)):
            copies = (copy for copy, original in key_map.copies if original == key)
            for name in (key, *copies):
                yield name, shape, functools.partial(value, leaf, rule, layer)


def exported(params: Params, key_map: KeyMap, dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the file's keys and tensors, one at a time; raises as `pending` does."""
    for key, _, read in pending(params, key_map, dtype):
        yield key, read()


def from_file(value: np.ndarray, rule: Rule) -> np.ndarray:
    """Returns a tensor of a file in our layout."""
    order = TRANSFORMS[rule.transform]
    return value if order is None else value.transpose(order)


def to_file(value: np.ndarray, rule: Rule) -> np.ndarray:
    """Returns a parameter (of one layer, where they are stacked) in the file's layout."""
    order = TRANSFORMS[rule.transform]
    return np.ascontiguousarray(value if order is None else value.transpose(np.argsort(order)))
