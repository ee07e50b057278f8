"""Batches as files of arrays, which both sides read; neither jax nor torch is imported."""

import collections
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

SIDES = ("query", "target", "negative")
FIELDS = ("tokens", "lengths", "image_index", "tiles", "features", "grid")


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of one shape, as `unime_jax.types.Inputs` has them, and the size of their pictures.

    Attributes:
      picture: (height, width) in pixels that the layout of the images was made from; None of text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    image_index: np.ndarray
    tiles: np.ndarray
    features: np.ndarray | None = None
    grid: np.ndarray | None = None
    picture: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """One batch; attributes as those of `unime_jax.types.Batch`."""

    sides: dict[str, list[Group]]
    orders: dict[str, np.ndarray]
    vectors: np.ndarray | None = None
    target_ids: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.orders["query"])

    def merged(self) -> list[tuple[Group, list[tuple[str, int, int]]]]:
        """Puts groups of one shape together.

        Each comes with the (side, number, rows) of the groups that it is made of, in order.
        """
        found: dict[Any, list[tuple[str, int, Group]]] = collections.defaultdict(list)
        for side, groups in self.sides.items():
            for number, group in enumerate(groups):
                arrays = [getattr(group, name) for name in FIELDS]
                shapes = tuple(x if x is None else x.shape[1:] for x in arrays)
                found[shapes, group.picture].append((side, number, group))
        merged = []
        for (_, picture), members in found.items():
            columns = [[getattr(group, name) for *_, group in members] for name in FIELDS]
            arrays = [None if parts[0] is None else np.concatenate(parts) for parts in columns]
            names = [(side, number, len(group.lengths)) for side, number, group in members]
            merged.append((Group(*arrays, picture), names))
        return merged

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return sum(group.tokens.size for groups in self.sides.values() for group in groups)


def save(path: pathlib.Path, rows: Rows) -> None:
    arrays: dict[str, Any] = {}
    for side, groups in rows.sides.items():
        arrays[f"{side}/order"] = rows.orders[side]
        for number, group in enumerate(groups):
            for field, value in dataclasses.asdict(group).items():
                if value is not None:
                    arrays[f"{side}/{number}/{field}"] = np.asarray(value)
    for name in ("vectors", "target_ids"):
        if getattr(rows, name) is not None:
            arrays[name] = getattr(rows, name)
    np.savez(path, **arrays)


def load(path: pathlib.Path) -> Rows:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    sides: dict[str, list[Group]] = {}
    orders = {}
    for side in SIDES:
        if f"{side}/order" not in arrays:
            continue
        orders[side] = arrays[f"{side}/order"]
        sides[side] = []
        while f"{side}/{len(sides[side])}/tokens" in arrays:
            prefix = f"{side}/{len(sides[side])}/"
            found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            if "picture" in found:
                found["picture"] = tuple(found["picture"].tolist())
            sides[side].append(Group(**found))
    return Rows(sides, orders, arrays.get("vectors"), arrays.get("target_ids"))


def fingerprint(sides: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Returns numbers that tell vectors apart, a few of each row: f32[N, E] of every side."""
    vectors = np.concatenate([sides[side] for side in SIDES if side in sides])
    directions = np.random.default_rng(0).standard_normal((vectors.shape[1], 4), np.float32)
    return {"rows": (vectors @ directions).ravel().tolist()}


def read_case(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "case.json").read_text())


def chunk_of(chunk: int, tokens: int, longest: int) -> int:
    """Rows of a group that are encoded at a time; shorter ones in proportion more."""
    return max(1, chunk * longest // tokens) if chunk else 0
