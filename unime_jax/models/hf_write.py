"""Writes checkpoints in Hugging Face layout: config.json, safetensors files and their index.

Tensors are written as they come, one after the other: no more than one is held.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from unime_jax.models.hf import INDEX_FILE, SINGLE_FILE, KeyMap, pending
from unime_jax.types import Params, UserError

SHARD_BYTES = 5 * 10**9
# dtypes of safetensors files by numpy's names; bfloat16 is ml_dtypes'.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
NAMES = {theirs: numpy for numpy, theirs in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Pending:
    """Is a tensor that is yet to be computed.

    Attributes:
      dtype: numpy's name, one of DTYPES.
      read: returns it, in that shape and dtype.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * jnp.dtype(self.dtype).itemsize


def write(
    directory,
    tensors: Sequence[Pending],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, str], None] | None = None,
) -> None:
    """Writes the weights; files get their names at last, so that a torn write has none.

    Args:
      directory: exists.
      tensors: more than `shard_bytes` of them are spread over several files.
      progress: called with the bytes written so far and the key that comes next.

    Raises:
      OSError: the disk is full or the directory cannot be written.
    """
    directory = pathlib.Path(directory)
    parts, done = _spread(tensors, shard_bytes), 0
    for number, part in enumerate(parts):
        with open(directory / f".part-{number}.safetensors", "wb") as file:
            file.write(_header(part))
            for tensor in part:
                if progress:
                    progress(done, tensor.key)
                file.write(_bytes(tensor))
                done += tensor.nbytes
    if len(parts) == 1:
        os.replace(directory / ".part-0.safetensors", directory / SINGLE_FILE)
        return
    weight_map = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        os.replace(directory / f".part-{number}.safetensors", directory / name)
        weight_map.update(dict.fromkeys([tensor.key for tensor in part], name))
    index = {"metadata": {"total_size": done}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _spread(tensors: Sequence[Pending], shard_bytes: int) -> list[list[Pending]]:
    parts: list[list[Pending]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.nbytes > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    # Wide dtypes first: then every tensor is aligned for readers that map the file.
    return [sorted(part, key=lambda t: -jnp.dtype(t.dtype).itemsize) for part in parts]


def _header(part: Sequence[Pending]) -> bytes:
    """Returns the start of a safetensors file: length, then JSON padded to 8 bytes.

    Source: the format's specification, github.com/huggingface/safetensors.
    """
    # transformers refuses files without this note.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in part:
        entries[tensor.key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Pending) -> memoryview:
    value = np.asarray(tensor.read(), order="C")
    if value.shape != tensor.shape or value.dtype.name != tensor.dtype:
        raise ValueError(f"{tensor.key} became {value.dtype}{value.shape}, not as announced")
    return memoryview(value.reshape(-1).view(np.uint8))


def save(
    directory,
    params: Params,
    key_map: KeyMap,
    config: Mapping[str, Any],
    dtype=jnp.float32,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and the weights of a model that is held.

    Raises:
      UserError: a parameter has no key in this layout (adapters: merge them first), or writing
        fails.
    """
    directory = pathlib.Path(directory)
    name = jnp.dtype(dtype).name
    tensors = [
        Pending(key, shape, name, read) for key, shape, read in pending(params, key_map, dtype)
    ]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write(directory, tensors, shard_bytes=shard_bytes)
        text = json.dumps({**config, "dtype": name}, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from None
