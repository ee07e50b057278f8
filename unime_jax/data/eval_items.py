"""What a benchmark embeds: texts, images and both, each once, by number."""

import pathlib
from collections.abc import Sequence
from typing import SupportsIndex

from unime_jax.data import image_files
from unime_jax.data.prompts import MMEB_SLOT
from unime_jax.data.sources import ImageRef, Item
from unime_jax.types import UserError


class Items(Sequence[Item]):
    """Numbers items; the same text with the same image has one number.

    Iterating yields them in order. Texts are as the files have them, an image's slot included.
    """

    def __init__(self):
        self._items: list[Item] = []
        self._numbers: dict[tuple[str, pathlib.Path | str], int] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: SupportsIndex) -> Item:
        return self._items[number]

    def add(self, text: str, image: ImageRef | None = None) -> int:
        """Returns the item's number; images are told apart by `identity`."""
        key = text, identity(image) if image else ""
        if key not in self._numbers:
            self._numbers[key] = len(self._items)
            self._items.append(Item(text or None, image))
        return self._numbers[key]


def identity(image: ImageRef) -> pathlib.Path | str:
    """Returns what is equal for the same image: sets of different roots may share names."""
    return image.file or image.name


class ImageFolder:
    """Image files below one directory, as rows name them.

    Args:
      root: where their paths start.
      image_root: directory that no path leaves; "": `root`.
    """

    def __init__(self, root: pathlib.Path, image_root: str = ""):
        self.root = root
        self._folder = image_files.Folder(root, image_root or None, option="config.image_root")

    def __call__(self, path: str) -> ImageRef:
        """Returns the image of a path; whether it can be read shows when it is loaded."""
        try:
            file = self._folder.path(path)
        except UserError as error:
            refusal = error  # the name is gone behind this block
            return ImageRef(-1, path, lambda: _refuse(refusal))
        return ImageRef(-1, path, lambda: image_files.read_file(file), file=file)


def _refuse(error: UserError) -> bytes:
    raise error


def shown(item: Item) -> str:
    """Returns an item's text for people: without the image's slot, on one line."""
    return " ".join((item.text or "").replace(MMEB_SLOT, " ").split())
