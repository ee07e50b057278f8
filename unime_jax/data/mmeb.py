"""Opens the sets that `prepare mmeb` wrote, with random access."""

import functools
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from unime_jax.data import mmeb_prepare, mmeb_sets, prompts
from unime_jax.data.sources import Example, ImageRef, damage
from unime_jax.types import UserError


class MmebSet:
    """Rows of one set whose images stand on the same sides; its files are opened at first use.

    Attributes:
      name: of the set.
      direction: what its sides are, for reports.
      directory: of the prepared set.
      members: its rows' numbers among all pairs of the set.
    """

    def __init__(self, directory: pathlib.Path, members: np.ndarray, has_image: tuple[bool, bool]):
        self.name = directory.name
        self.directory = directory
        self.members = members
        self.has_image = has_image
        self.direction = " to ".join("image" if image else "text" for image in has_image)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def fingerprint(self) -> str:
        """Is equal for equal rows: what was prepared, from which files, and which rows of it."""
        content = (self.directory / mmeb_prepare.SUMMARY).read_bytes() + self.members.tobytes()
        return hashlib.sha256(self.name.encode() + content).hexdigest()

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Reads several rows, twice as fast as one by one."""
        with damage(self.directory):
            rows = self._pairs.__getitems__([int(self.members[index]) for index in indices])
        return [self._example(row) for row in rows]

    @functools.cached_property
    def _pairs(self):
        return self._open("pairs")

    @functools.cached_property
    def _images(self):
        return self._open("images")

    def _open(self, name: str):
        from unime_jax.data import mmeb_builder

        with damage(self.directory):
            return mmeb_builder.read(self.directory, name)

    def __getstate__(self):
        """Leaves open files behind: another process opens its own."""
        state = dict(self.__dict__)
        state.pop("_pairs", None)
        state.pop("_images", None)
        return state

    def _example(self, row: dict) -> Example:
        sides = {}
        for side in ("query", "target"):
            number = int(row[f"{side}_image"])
            text = row[f"{side}_text"].decode()
            sides[f"{side}_text"] = prompts.slotted(text) if number >= 0 else text
            sides[f"{side}_image"] = self._image(number, int(row["row"])) if number >= 0 else None
        return Example(**sides, target_id=row["target_key"].decode(), set=self.name)

    def _image(self, number: int, row: int) -> ImageRef:
        def load() -> bytes:
            with damage(self.directory):
                return self._images[number]["image"]

        return ImageRef(number, f"{self.name} row {row}", load)


def is_prepared(path: pathlib.Path) -> bool:
    """Says whether `prepare mmeb` has written a set there."""
    return any((path / name / mmeb_prepare.SUMMARY).is_file() for name in mmeb_sets.NAMES)


def choose(path: pathlib.Path, names: Sequence[str] = ()) -> list[str]:
    """Returns the names of the sets to be read, all that are there where none are named.

    Raises:
      UserError: a set that is not there.
    """
    there = [n for n in mmeb_sets.NAMES if (path / n / mmeb_prepare.SUMMARY).is_file()]
    for name in names:
        if name not in there:
            raise UserError(
                f"config.data.sets: {path} has no set {name!r}, only {', '.join(there)}; prepare "
                f"it with `python -m unime_jax.prepare mmeb --sets {name} ...`"
            )
    return list(names) or there


def open_sets(
    path: pathlib.Path, names: Sequence[str] = (), rows_per_set: int = 0
) -> list[MmebSet]:
    """Opens sets; one whose rows differ in the sides of their images comes in parts.

    Args:
      path: the output directory of `prepare mmeb`.
      names: of sets; empty: all that are there.
      rows_per_set: the first so many pairs of each; 0: all.

    Raises:
      UserError: a set that is not there, or damaged.
    """
    found = []
    for name in choose(path, names):
        with damage(path / name):
            has_image = np.load(path / name / mmeb_prepare.SIDES)
        has_image = has_image[: rows_per_set or None]
        for sides in sorted({tuple(map(bool, row)) for row in np.unique(has_image, axis=0)}):
            members = np.flatnonzero((has_image == sides).all(1))
            found.append(MmebSet(path / name, members, sides))
    return found
