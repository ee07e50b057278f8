"""What users name as a model, resolved to where its weights are.

A name is a directory in Hugging Face layout or its id on the hub, a model directory of ours, the
output directory of a training run or one of its checkpoints (RUN/checkpoints/STEP), or an adapter
in PEFT's format. Runs and adapters change a base, which may be any of these again.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from unime_jax import checkpoint, file_hashes, models, runtime
from unime_jax.models import hf, hf_read, hf_write, hub, peft
from unime_jax.types import Params, UserError

# Keys of `config.data` that hold for a trained model ever after.
PREPARATION = ("prompt", "image_size", "image_crops", "fusion")
PREPARATION_FILE = "preparation.json"
_READ_WHOLE = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
_READ_INSTEAD = "processor_config.json"  # of the last of these, where it is not there
_LAYERS = 10_000  # no model has more; a damaged file may say so
_TREES = ("params", "unused")  # of a model directory of ours


@dataclasses.dataclass(frozen=True)
class Weights:
    """Is a model as it lies on the disk.

    Attributes:
      name: as it was asked for.
      base_name: path or hub id of the model in Hugging Face layout at the bottom.
      directory: holds config.json and the tokenizer.
      config: content of config.json, see `models.read_config`.
      key_map: the model's keys.
      base: the tensors without the changes.
      changes: of runs and adapters, in their order.
      preparation: how the training prepared its rows, keys of PREPARATION; {} if unknown.
    """

    name: str
    base_name: str
    directory: pathlib.Path
    config: dict[str, Any]
    key_map: hf.KeyMap
    base: hf.Source
    changes: tuple[peft.Adapter, ...] = ()
    preparation: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def source(self) -> hf.Source:
        """The tensors, changed."""
        source = self.base
        for change in self.changes:
            source = peft.Adapted(source, change, self.key_map)
        return source

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells models apart that embed differently, wherever they lie: 16 hex digits.

        Every byte of settings, tokenizer and weights counts: a model that was merged from its base
        and an adapter differs from the base in any of them.
        """
        digest = hashlib.blake2b(digest_size=8)
        digest.update(json.dumps([self.config, self.preparation], sort_keys=True).encode())
        for name, content in self._files.items():
            digest.update(f"{name}:".encode() + content)
        self._add_changes(digest)
        return digest.hexdigest()

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Tells of what a model is made of which part is another one, by name."""
        config = json.dumps(self.config, sort_keys=True).encode()
        found = {"config.json": file_hashes.of_bytes(config), **self._files}
        if self.changes:
            digest = hashlib.blake2b(digest_size=file_hashes.BYTES)
            self._add_changes(digest)
            found["what was trained on top"] = digest.digest()
        return {name: content.hex() for name, content in found.items()}

    @functools.cached_property
    def _files(self) -> dict[str, bytes]:
        """Hashes of the files; those that were hashed before and look as then are not read."""
        paths = sorted(path for path in self.directory.rglob("*") if self._counts(path))
        names = [str(path.relative_to(self.directory)) for path in paths]
        found = file_hashes.of_files(paths, runtime.cache_directory())
        return dict(zip(names, found, strict=True))

    def _add_changes(self, digest) -> None:
        for change in self.changes:
            for key, low_rank in sorted(change.low_rank.items()):
                digest.update(f"{key}:{low_rank.scale}:".encode())
                for part in (low_rank.a, low_rank.b, low_rank.magnitude):
                    digest.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
            for key, value in sorted(change.replaced.items()):
                digest.update(key.encode() + np.ascontiguousarray(value).tobytes())

    def _counts(self, path: pathlib.Path) -> bool:
        """Says whether a file is part of the model."""
        parts = path.relative_to(self.directory).parts
        read = {*_READ_WHOLE}
        if not (self.directory / _READ_WHOLE[-1]).is_file():
            read.add(_READ_INSTEAD)
        here = len(parts) == 1 and (path.suffix == ".safetensors" or path.name in read)
        return (here or parts[0] in _TREES) and path.is_file()

    def fill(self, abstract: Params, key_map: hf.KeyMap | None = None, finish=None) -> Params:
        """Returns the parameters in the dtypes and on the shardings asked for.

        Args:
          abstract: all of the model's parameters, or those of `key_map`.
          key_map: the model's, or a part of it.
          finish: see `hf.fill`.
        """
        if isinstance(self.base, Stored) and not self.changes and finish is None:
            return checkpoint.read_model(self.directory, abstract)
        return hf.fill(self.source, key_map or self.key_map, abstract, finish=finish)


def find(name: str | os.PathLike, adapter: str | os.PathLike | None = None) -> Weights:
    """Finds a model; weights are read later.

    Args:
      name: a directory or hub id.
      adapter: a run directory or a PEFT adapter to put on top.

    Raises:
      UserError: there is no such model, or its files do not belong together.
    """
    weights = _find(name)
    return weights if adapter is None else _changed(weights, _locate(adapter))


def config_directory(name: str | os.PathLike) -> pathlib.Path:
    """Returns the directory of a model's config.json and tokenizer; weights need not be there.

    Raises:
      UserError: there is no such directory.
    """
    path = _locate(name)
    if checkpoint.is_run(path):
        return config_directory(_base_of_run(path))
    if peft.is_adapter(path) and not hf_read.has_weights(path):
        return config_directory(_base_of_adapter(path))
    return path


def _locate(name: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name} is a file; give the directory of a model")
    if hub.is_name(str(name)):
        return hub.fetch(str(name))
    raise UserError(
        f"{name}: no such directory; give a Hugging Face directory or hub id, a model directory of "
        "ours, a training run's directory or a PEFT adapter"
    )


def _find(name: str | os.PathLike) -> Weights:
    path = _locate(name)
    if checkpoint.is_run(path):
        return dataclasses.replace(_changed(_find(_base_of_run(path)), path), name=str(name))
    if peft.is_adapter(path) and not hf_read.has_weights(path):
        return dataclasses.replace(_changed(_find(_base_of_adapter(path)), path), name=str(name))
    config = models.read_config(path)
    try:
        key_map = models.rules(config)
    except UserError as error:  # speaks of config.json
        raise UserError(f"{path}: {error}") from None
    if checkpoint.is_model(path):
        base_name = checkpoint.read_model_notes(path)["base"] or str(path.resolve())
        source = Stored(path, key_map)
    else:
        local = pathlib.Path(name).expanduser().is_dir()
        base_name = str(path.resolve()) if local else str(name)
        source = hf_read.Reader(path, key_map)
    preparation = _preparation(path) or {}
    return Weights(str(name), base_name, path, config, key_map, source, preparation=preparation)


def _preparation(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns what a directory says of how rows are prepared; None if nothing."""
    if checkpoint.is_run(path):
        data = _setting(path, "data", dict)
        found = {key: data[key] for key in PREPARATION if key in data}
        return _checked(path / checkpoint.RUN_FILE, found)
    if not (path / PREPARATION_FILE).is_file():
        return None
    found = hf.read_json(path / PREPARATION_FILE)
    unknown = sorted(set(found) - set(PREPARATION))
    if unknown:
        raise UserError(f"{path / PREPARATION_FILE}: unknown {', '.join(unknown)}")
    return _checked(path / PREPARATION_FILE, found)


def _checked(file: pathlib.Path, preparation: dict[str, Any]) -> dict[str, Any]:
    for key, value in preparation.items():
        kind = int if key.startswith("image_") else str
        if type(value) is not kind or (kind is int and not 0 <= value < 2**16):
            raise UserError(f"{file}: {key} is {value!r}; is the file damaged?")
    return preparation


def _setting(run: pathlib.Path, name: str, kind) -> Any:
    """Returns a value of a run's configuration.

    Raises:
      UserError: it is not there or of another kind.
    """
    found: Any = checkpoint.read_run(run)
    for key in name.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool) or found == 0:
        raise UserError(f"{run}/{checkpoint.RUN_FILE}: {name} is {found!r}; is the file damaged?")
    return found


def _changed(weights: Weights, path: pathlib.Path) -> Weights:
    if checkpoint.is_run(path):
        change = _read_run(path, weights)
    elif peft.is_adapter(path):
        change = peft.read(path, weights.key_map)
    else:
        raise UserError(
            f"{path}: neither the output directory of a training run nor a PEFT adapter "
            f"({peft.CONFIG_FILE})"
        )
    preparation = _preparation(path)
    return dataclasses.replace(
        weights,
        changes=(*weights.changes, change),
        preparation=weights.preparation if preparation is None else preparation,
    )


def _base_of_run(path: pathlib.Path) -> str | pathlib.Path:
    path, _ = checkpoint.locate(path)
    base = pathlib.Path(_setting(path, "model.path", str))
    name = base.relative_to(checkpoint.locate(base)[0].parent)  # of a run, with the checkpoint's
    for place in (base, path.parent / name):  # the second: runs that were moved together
        if _is_other(place, path):
            return place
    raise UserError(f"{path} was trained from {name}, which is neither where it was nor beside it")


def _base_of_adapter(path: pathlib.Path) -> str | pathlib.Path:
    base = peft.base_of(path)
    for place in (pathlib.Path(base).expanduser(), path.parent / base):
        if _is_other(place, path):
            return place
    if hub.is_name(base):
        return base
    raise UserError(
        f"{path}/{peft.CONFIG_FILE} names the base {base}, which is not there; give the base as "
        "the model and this directory as the adapter"
    )


def _is_other(place: pathlib.Path, path: pathlib.Path) -> bool:
    """Tells whether a directory is there that is not what asks for its base."""
    return place.is_dir() and not checkpoint.locate(place)[0].samefile(path)


def _read_run(run: pathlib.Path, weights: Weights) -> peft.Adapter:
    """Returns a run's newest trainable parameters in the layout of files."""
    dropout = _setting(run, "train.adapters", dict).get("dropout")
    if not isinstance(dropout, int | float):
        raise UserError(f"{run}: train.adapters.dropout is {dropout!r}; is the file damaged?")
    trained = checkpoint.read_trainable(run)
    rules = {rule.ours: rule for rule in weights.key_map.rules}
    low_rank, replaced, unknown = {}, {}, []
    for path, value in trained.items():
        module, _, name = path.rpartition("/")
        rule = rules.get(f"{module}/kernel" if name in ("lora_A", "lora_B") else path)
        if rule is None:
            unknown.append(path)
        elif name == "lora_A":
            alpha, rank = (
                _setting(run, f"train.adapters.{key}", int | float) for key in ("alpha", "rank")
            )
            scale = alpha / rank
            other = trained[f"{module}/lora_B"]
            pairs = zip(_layers(rule, value), _layers(rule, other), strict=True)
            for key, (a, b) in zip(hf.keys_of(rule, value.shape), pairs, strict=True):
                low_rank[key] = peft.LowRank(a.T, b.T, scale)
        elif name != "lora_B":
            keys = hf.keys_of(rule, value.shape)
            replaced.update(
                zip(keys, (hf.to_file(x, rule) for x in _layers(rule, value)), strict=True)
            )
    if unknown:
        names = ", ".join(sorted(unknown)[:5])
        raise UserError(f"{run}: parameters unknown to its base model: {names}")
    return peft.Adapter(str(run), low_rank, replaced, float(dropout))


def _layers(rule: hf.Rule, value: np.ndarray):
    return value if rule.stacked else [value]


class Stored:
    """Is the source over a model directory of ours.

    A stacked parameter is read as a whole and kept until another one is asked for.
    """

    def __init__(self, directory: pathlib.Path, key_map: hf.KeyMap):
        self.name = str(directory)
        self._directory = directory
        self._notes = notes = checkpoint.read_model_notes(directory)
        self._places: dict[str, tuple[hf.Rule | None, str, int]] = {}
        for rule in key_map.rules:
            if rule.ours in notes["params"]:
                shape = tuple(notes["params"][rule.ours]["shape"])
                if rule.stacked and not (shape and shape[0] <= _LAYERS):
                    raise UserError(f"{directory}: {rule.ours} of shape {shape}; damaged?")
                for layer, key in enumerate(hf.keys_of(rule, shape)):
                    self._places[key] = (rule, rule.ours, layer)
        self._places |= {key: (None, key, 0) for key in notes["unused"]}
        originals = dict(key_map.copies)
        self._places |= {key: self._places[originals[key]] for key in notes["copies"]}
        self._held: tuple[str, np.ndarray] | None = None

    def keys(self) -> set[str]:
        return set(self._places)

    def slice(self, key: str) -> hf.Tensor:
        return _StoredTensor(self, key)

    def shape(self, key: str) -> tuple[int, ...]:
        rule, name, _ = self._places[key]
        if rule is None:
            return tuple(self._notes["unused"][name]["shape"])
        shape = self._notes["params"][name]["shape"]
        return hf.in_file(rule, tuple(shape[1:] if rule.stacked else shape))

    def dtype(self, key: str) -> str:
        rule, name, _ = self._places[key]
        tree = "unused" if rule is None else "params"
        narrow = self._notes["narrow"].get(key)
        return narrow or hf_write.DTYPES[self._notes[tree][name]["dtype"]]

    def read(self, key: str) -> np.ndarray:
        rule, name, layer = self._places[key]
        if rule is None:
            return checkpoint.read_model_leaf(self._directory, "unused", name)
        if self._held is None or self._held[0] != name:
            self._held = None  # before the next one is read
            self._held = (name, checkpoint.read_model_leaf(self._directory, "params", name))
        value = self._held[1]
        if list(value.shape) != self._notes["params"][name]["shape"]:
            raise UserError(f"{self._directory}: {name} is {value.shape}, not as model.json says")
        return hf.to_file(value[layer] if rule.stacked else value, rule)


@dataclasses.dataclass(frozen=True)
class _StoredTensor:
    source: Stored
    key: str

    def get_shape(self) -> tuple[int, ...]:
        return self.source.shape(self.key)

    def get_dtype(self) -> str:
        return self.source.dtype(self.key)

    def __getitem__(self, index) -> np.ndarray:
        return self.source.read(self.key)[index]
