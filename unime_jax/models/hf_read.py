"""Reads the safetensors files of a directory in Hugging Face layout."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors

from unime_jax.models.hf import (
    INDEX_FILE,
    SINGLE_FILE,
    KeyMap,
    Tensor,
    fill,
    listed,
    read_json,
    renamed,
)
from unime_jax.types import Params, UserError

_MAPPED_BYTES = 2**26  # read before mapped files are closed


class Reader:
    """Is the source over all safetensors files of a directory; reads on demand.

    Raises:
      UserError: files are missing, damaged or not as the index says; names all of them.
    """

    def __init__(self, directory, key_map: KeyMap):
        directory = pathlib.Path(directory)
        self.name = str(directory)
        self._tensors: dict[str, _Lazy] = {}
        self._open: dict[pathlib.Path, Any] = {}
        self._mapped = 0
        files = _weight_files(directory)
        missing = [path.name for path in files if not path.exists()]
        problems = [f"{directory} lacks {name}, which {INDEX_FILE} names" for name in missing]
        for path, promised in files.items():
            if path.name in missing:
                continue
            try:
                with safetensors.safe_open(path, framework="numpy") as file:
                    parts = {name: file.get_slice(name) for name in file.keys()}
                    lazy = {
                        name: _Lazy(self, path, name, tuple(part.get_shape()), part.get_dtype())
                        for name, part in parts.items()
                    }
            except (safetensors.SafetensorError, OSError) as error:
                problems.append(f"{path} is corrupt or cut short ({error}); fetch it again")
                continue
            if absent := sorted(promised - set(lazy)):
                problems.append(f"{path} lacks what {INDEX_FILE} names: {listed('keys', absent)}")
            for name, tensor in lazy.items():
                key = renamed(name, key_map)
                if key in self._tensors:
                    other = self._tensors[key].name
                    problems.append(f"{path}: {name} and {other} are both {key}")
                self._tensors[key] = tensor
        if problems:
            raise UserError("; ".join(problems))

    def keys(self) -> set[str]:
        return set(self._tensors)

    def slice(self, key: str) -> Tensor:
        return self._tensors[key]

    def read(self, path: pathlib.Path, name: str, index) -> np.ndarray:
        """Copies a part of a tensor out of its file.

        Files are mapped, and what was touched of them counts as this process's memory until they
        are closed: now and then all are.
        """
        if self._mapped > _MAPPED_BYTES:
            self._open.clear()
            self._mapped = 0
        if path not in self._open:
            self._open[path] = safetensors.safe_open(path, framework="numpy")
        value = self._open[path].get_slice(name)[index]
        self._mapped += value.nbytes
        return value


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """Is a `Tensor` of a file."""

    reader: Reader
    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> Sequence[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index) -> np.ndarray:
        return self.reader.read(self.path, self.name, index)


def has_weights(directory) -> bool:
    """Tells whether a directory holds safetensors files of a model."""
    return any((pathlib.Path(directory) / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def _weight_files(directory: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    """Returns the files, each with the keys that the index says are in it."""
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if single.exists():
        return {single: set()}
    if not index.exists():
        pickled = next((path.name for path in sorted(directory.glob("*.bin"))), "")
        hint = f"; {pickled} may run code when read, and is not: convert it to safetensors"
        raise UserError(
            f"{directory} holds neither {single.name} nor {index.name}{hint if pickled else ''}"
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map")
    if strange := [key for key, name in names.items() if not isinstance(name, str)]:
        raise UserError(f"{index}: weight_map names no files for {listed('keys', strange)}")
    # A file of another directory is none of this model's.
    if outside := sorted({name for name in names.values() if not _is_plain(name)}):
        raise UserError(f"{index}: weight_map names files elsewhere: {', '.join(outside[:3])}")
    files: dict[pathlib.Path, set[str]] = {}
    for key, name in sorted(names.items(), key=lambda item: item[1]):
        files.setdefault(directory / name, set()).add(key)
    return files


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[^/\\\0]{1,200}", name) is not None and name not in (".", "..")


def load(directory, key_map: KeyMap, abstract: Params) -> Params:
    """Fills a model's parameters from a directory; see `hf.fill`.

    Raises:
      UserError: a file is missing or corrupt, keys are missing, unknown or of another shape.
    """
    return fill(Reader(directory, key_map), key_map, abstract)
