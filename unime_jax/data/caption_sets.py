"""Reads Flickr30K, COCO, ShareGPT4V, Urban1K and SugarCrepe as published.

Images are read when they are asked for; what is missing of them shows then.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Iterator

import numpy as np

from unime_jax.data.eval_items import ImageFolder, Items
from unime_jax.data.sources import ImageRef
from unime_jax.types import UserError, reason

CAPTIONS = 5  # of an image in Flickr30K and COCO; what is beyond is left out
SHAREGPT4V_ROWS = 1000
SHAREGPT4V_FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
_READ = 1 << 20  # bytes of a long JSON list at a time


@dataclasses.dataclass(frozen=True)
class CaptionSet:
    """Images and captions, by number of the item.

    Attributes:
      images: int[N].
      captions: int[M].
      owner: int[M], the place in `images` that a caption belongs to.
    """

    images: np.ndarray
    captions: np.ndarray
    owner: np.ndarray


@dataclasses.dataclass(frozen=True)
class Triples:
    """Rows of SugarCrepe, by number of the item: int[N] each."""

    images: np.ndarray
    captions: np.ndarray
    negatives: np.ndarray


def find_folder(root: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
    """Returns the directory of one of these names, whatever its case and dashes; None if none."""
    if not root.is_dir():
        return None
    try:
        folders = sorted(root.iterdir())
    except OSError as error:
        raise UserError(f"{root}: cannot be listed ({error.strerror})") from None
    for folder in folders:
        if folder.is_dir() and is_named(folder, names):
            return folder
    return None


def is_named(folder: pathlib.Path, names: tuple[str, ...]) -> bool:
    """Tells whether a directory has one of these names, whatever its case and dashes."""
    return _plain(os.path.basename(os.path.abspath(folder))) in names


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


# ---------------------------------------------------------------- Flickr30K, COCO


def read_parquet(folder: pathlib.Path, items: Items, *, limit: int = 0) -> CaptionSet:
    """Reads a set whose parquet files have the columns `image` (bytes) and `text` (captions).

    Raises:
      UserError: no such file, or one that is not as published.
    """
    files = sorted(folder.rglob("test-*.parquet")) or sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(f"{folder}: no parquet files in it")
    images, captions, owner = [], [], []
    for path in files:
        source = _ParquetImages(path)
        for row, texts in enumerate(source.captions()):
            if limit and len(images) == limit:
                break
            images.append(items.add("", source.image(row)))
            for text in texts[:CAPTIONS]:
                captions.append(items.add(text))
                owner.append(len(images) - 1)
    return _caption_set(images, captions, owner)


class _ParquetImages:
    """A parquet file with images; the row group that was read last stays in memory."""

    def __init__(self, path: pathlib.Path):
        import pyarrow
        import pyarrow.parquet

        self._path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
            names = self._file.schema_arrow.names
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{path}: not a readable parquet file ({reason(error)}); fetch it again"
            ) from None
        self._text = next((name for name in ("text", "caption", "captions") if name in names), None)
        if "image" not in names or self._text is None:
            raise UserError(f"{path}: no columns `image` and `text`, but {', '.join(names)}")
        groups = self._file.metadata
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._held: tuple[int, list] = (-1, [])
        self._lock = threading.Lock()

    def captions(self) -> Iterator[list[str]]:
        import pyarrow

        row = 0
        try:
            for batch in self._file.iter_batches(1024, columns=[self._text]):
                for value in batch.column(0).to_pylist():
                    texts = value if isinstance(value, list) else [value]
                    texts = [text for text in texts if text]
                    if not all(isinstance(text, str) for text in texts):
                        raise UserError(f"{self._path} row {row}: {self._text} is not text")
                    yield texts
                    row += 1
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{self._path} row {row}: damaged ({reason(error)}); fetch it again"
            ) from None

    def image(self, row: int) -> ImageRef:
        return ImageRef(-1, f"{self._path} row {row}", lambda: self._read(row))

    def _read(self, row: int) -> bytes:
        import pyarrow

        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            if self._held[0] != group:
                try:
                    column = self._file.read_row_group(group, columns=["image"]).column(0)
                    self._held = group, column.to_pylist()
                except (OSError, ValueError, pyarrow.ArrowException) as error:
                    raise UserError(f"{self._path} row {row}: damaged ({reason(error)})") from None
            value = self._held[1][row - int(self._starts[group])]
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes) or not content:
            raise UserError(f"{self._path} row {row}: no image in it")
        return content


def _caption_set(images: list[int], captions: list[int], owner: list[int]) -> CaptionSet:
    return CaptionSet(*(np.array(numbers, np.int64) for numbers in (images, captions, owner)))


# ---------------------------------------------------------------- ShareGPT4V, Urban1K


def read_sharegpt4v(
    folder: pathlib.Path,
    images: pathlib.Path,
    items: Items,
    *,
    limit: int = 0,
    image_root: str = "",
) -> CaptionSet:
    """Reads the first 1000 entries of the JSON list in a directory.

    Args:
      folder: holds the list.
      images: directory that its image paths start from.
      items: gets what is not in it yet.
      limit: the first so many entries; 0: all 1000.
      image_root: see `ImageFolder`.
    """
    path = _sharegpt4v_file(folder)
    open_image = ImageFolder(images, image_root)
    pictures, captions = [], []
    count = min(limit or SHAREGPT4V_ROWS, SHAREGPT4V_ROWS)
    for row, entry in enumerate(itertools.islice(_entries(path), count)):
        try:
            image, caption = entry["image"], entry["conversations"][1]["value"]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{path} entry {row}: no image, or no conversations[1].value") from None
        _check_texts(f"{path} entry {row}", image, caption)
        pictures.append(items.add("", open_image(image)))
        captions.append(items.add(caption.replace("\n", " ")))
    return _caption_set(pictures, captions, list(range(len(pictures))))


def _sharegpt4v_file(folder: pathlib.Path) -> pathlib.Path:
    found = sorted(folder.glob("*.json"))
    if folder / SHAREGPT4V_FILE in found:
        return folder / SHAREGPT4V_FILE
    if len(found) != 1:
        raise UserError(f"{folder}: neither {SHAREGPT4V_FILE} nor one other .json file in it")
    return found[0]


def first_image(folder: pathlib.Path) -> str:
    """Returns the path of ShareGPT4V's first image, "" where the list has none."""
    entry = next(_entries(_sharegpt4v_file(folder)), None)
    found = entry.get("image") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else ""


def _entries(path: pathlib.Path) -> Iterator[dict]:
    """Reads a JSON list entry by entry: the published one has 1.2 million, of which few count."""
    decoder, text, started = json.JSONDecoder(), "", False
    try:
        with open(path, encoding="utf-8-sig") as file:
            while True:
                text = (text.lstrip().removeprefix(",") if started else text).lstrip()
                if not started and text:
                    if text[0] != "[":
                        raise UserError(f"{path}: not a JSON list")
                    text, started = text[1:].lstrip(), True
                if started and text.startswith("]"):
                    return
                try:
                    entry, end = decoder.raw_decode(text)
                except ValueError:
                    if not (more := file.read(_READ)):
                        raise UserError(f"{path}: ends in the middle of an entry") from None
                    text += more
                    continue
                yield entry
                text = text[end:]
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _check_texts(where: str, *values) -> None:
    """Refuses what JSON may hold in a text's place: numbers, lists, halves of surrogate pairs."""
    for value in values:
        if not isinstance(value, str):
            raise UserError(f"{where}: {str(value)[:60]!r} stands where a text should")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: half a surrogate pair in it, which is no character"
            ) from None


def read_urban1k(
    folder: pathlib.Path, items: Items, *, limit: int = 0, image_root: str = ""
) -> CaptionSet:
    """Reads image/NAME.jpg and the first line of caption/NAME.txt."""
    found = sorted((folder / "caption").glob("*.txt"), key=lambda path: (len(path.stem), path.stem))
    if not found:
        raise UserError(f"{folder}: no caption/*.txt in it")
    open_image = ImageFolder(folder / "image", image_root)
    pictures, captions = [], []
    for path in found[: limit or None]:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        pictures.append(items.add("", open_image(f"{path.stem}.jpg")))
        captions.append(items.add(lines[0] if lines else ""))
    return _caption_set(pictures, captions, list(range(len(pictures))))


# ---------------------------------------------------------------- SugarCrepe


def read_sugarcrepe(
    path: pathlib.Path,
    images: pathlib.Path,
    items: Items,
    *,
    limit: int = 0,
    image_root: str = "",
) -> Triples:
    """Reads one of SugarCrepe's files.

    Args:
      path: of the JSON file.
      images: directory of COCO's val2017.
      items: gets what is not in it yet.
      limit: the first so many rows; 0: all.
      image_root: see `ImageFolder`.
    """
    rows = _rows(path)
    open_image = ImageFolder(images, image_root)
    found = []
    for number, row in enumerate(rows[: limit or None]):
        try:
            image, texts = row["filename"], (row["caption"], row["negative_caption"])
        except (KeyError, TypeError):
            raise UserError(
                f"{path} row {number}: no filename, caption or negative_caption"
            ) from None
        _check_texts(f"{path} row {number}", image, *texts)
        found.append([items.add("", open_image(image)), *map(items.add, texts)])
    return Triples(*np.array(found, np.int64).reshape(-1, 3).T)


def first_filename(path: pathlib.Path) -> str:
    """Returns the first image that one of SugarCrepe's files names, "" where there is none."""
    row = next(iter(_rows(path)), None)
    found = row.get("filename") if isinstance(row, dict) else None
    return found if isinstance(found, str) else ""


def _rows(path: pathlib.Path) -> list:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    rows = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise UserError(f"{path}: not rows of filename, caption and negative_caption")
    return rows
