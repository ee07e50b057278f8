"""Several processes embed one benchmark: each takes a share, all get to know what came of it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unime_jax import runtime
from unime_jax.evaluation.store import KEY_BYTES, VectorStore
from unime_jax.types import UserError

_ROWS = 4096  # exchanged at a time
_REASON = 200  # bytes of a reason that are passed on


def count() -> int:
    return jax.process_count()


def index() -> int:
    return jax.process_index()


def is_first() -> bool:
    return index() == 0


def first_ones(array: np.ndarray) -> np.ndarray:
    """Returns process 0's array, which has the same shape in all."""
    if count() == 1:
        return array
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def same_sets(sets: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sets that process 0 has read, in its order: all go through the same ones.

    Raises:
      UserError: in every process, if one of them lacks a set.
    """
    if count() == 1:
        return dict(sets)
    from jax.experimental import multihost_utils

    names = json.loads(runtime.from_main(json.dumps(list(sets))))
    lacking = [name for name in names if name not in sets]
    counts = np.asarray(multihost_utils.process_allgather(np.int32(len(lacking))))
    if counts.any():
        which = f" ({', '.join(lacking)})" if lacking else ""
        raise UserError(
            f"process {int(counts.argmax())} cannot read {counts.max()} of the {len(names)} sets "
            f"that process 0 has{which}; config.data.path must lie where all processes see it"
        )
    return {name: sets[name] for name in names}


def agreed(keys: list[bytes]) -> list[bytes]:
    """Returns process 0's list: each looks at the store at another moment."""
    if count() == 1:
        return keys
    number = int(first_ones(np.int64(len(keys))))
    if not number:
        return []
    mine = np.zeros((number, KEY_BYTES), np.uint8)
    if is_first():
        mine[:] = np.frombuffer(b"".join(keys), np.uint8).reshape(number, KEY_BYTES)
    return [row.tobytes() for row in first_ones(mine)]


def share(keys: Sequence[bytes]) -> list[bytes]:
    """Returns this process's keys."""
    return list(keys[index() :: count()])


def exchange(keys: Sequence[bytes], store: VectorStore, failed: dict[bytes, str]) -> None:
    """Gives every process the vectors and the faults of the others' shares.

    With one file system for all the vectors are there already; they are sent all the same, for
    there may be none.
    """
    if count() == 1:
        return
    from jax.experimental import multihost_utils

    def gather(array: np.ndarray) -> np.ndarray:
        return np.asarray(multihost_utils.process_allgather(array))

    found = [key for key in keys if key in store]
    faults = [key for key in keys if key in failed]
    width = store.vectors(found[:1]).shape[1] if found else 0
    sizes = gather(np.array([len(found), len(faults), width], np.int64))
    width = int(sizes[:, 2].max())
    for start in range(0, int(sizes[:, 0].max()), _ROWS):
        part = found[start : start + _ROWS]
        rows = min(_ROWS, int(sizes[:, 0].max()) - start)
        vectors, names = np.zeros((rows, width), np.float32), np.zeros((rows, KEY_BYTES), np.uint8)
        if part:
            vectors[: len(part)] = store.vectors(part)
            names[: len(part)] = np.frombuffer(b"".join(part), np.uint8).reshape(-1, KEY_BYTES)
        vectors, names = gather(vectors), gather(names)
        store.refresh()
        for process in range(count()):
            here = range(min(rows, max(0, int(sizes[process, 0]) - start)))
            new = [i for i in here if names[process, i].tobytes() not in store]
            store.add([names[process, i].tobytes() for i in new], vectors[process, new])
    if sizes[:, 1].max():
        lines = np.zeros((int(sizes[:, 1].max()), KEY_BYTES + _REASON), np.uint8)
        for row, key in enumerate(faults):
            text = key + failed[key].encode()[:_REASON]
            lines[row, : len(text)] = np.frombuffer(text, np.uint8)
        for process, rows in enumerate(gather(lines)):
            for line in rows[: int(sizes[process, 1])]:
                reason = line[KEY_BYTES:].tobytes().rstrip(b"\0").decode(errors="replace")
                failed.setdefault(line[:KEY_BYTES].tobytes(), reason)
    store.flush()
