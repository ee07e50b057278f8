"""Reads training and evaluation data with random access: tfds directories, pairs.jsonl, NLI."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from unime_jax.data import image_files, json_files, nli, prompts, text_keys
from unime_jax.types import UserError, reason

DIRECTIONS = ("image_to_text", "text_to_image")


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """An image not read yet.

    Attributes:
      number: its place among the source's images; cached features lie under it.
      name: what messages call it.
      load: returns the encoded bytes.
      path: as the row gives it, where it gives one.
      file: holds them and nothing else; None where there is no such file.
    """

    number: int
    name: str
    load: Callable[[], bytes]
    path: str = ""
    file: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Item:
    """What a row may have as a side: a text, an image, or both."""

    text: str | prompts.Slotted | None = None
    image: ImageRef | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """One row: a query, its target, and which data set it belongs to.

    Attributes:
      query_text, target_text: None where that side is an image alone.
      query_image, target_image: None where that side is a text alone.
      target_id: equal for equal targets; "" without a target, or where its text and the content of
        its image decide.
      set: the data set's name.
      negatives: hard negatives of this row, its own; as many in every row of a source.
      scores: a judge's scores of the target and of each negative; -inf for a place left empty.
      negative_text: a text that is no target although it looks like one; None without.
      negative_id: as `target_id`, of the negative.
      other_texts: texts that say the same as this row's text, to be drawn in its place.
    """

    query_text: str | prompts.Slotted | None = None
    query_image: ImageRef | None = None
    target_text: str | prompts.Slotted | None = None
    target_image: ImageRef | None = None
    target_id: str = ""
    set: str = ""
    negatives: tuple[Item, ...] = ()
    scores: tuple[float, ...] = ()
    negative_text: str | None = None
    negative_id: str = ""
    other_texts: tuple[str, ...] = ()


def sides_of(example: Example) -> tuple[tuple[Item, ...], ...]:
    """Returns what the query, the target and the negatives are; () where there is no such side."""
    negatives = example.negatives
    if example.negative_text is not None:
        negatives = (Item(example.negative_text),)
    query = Item(example.query_text, example.query_image)
    target = Item(example.target_text, example.target_image)
    return tuple((item,) if item != Item() else () for item in (query, target)) + (negatives,)


@runtime_checkable
class Source(Protocol):
    """Rows by number. `name` stands in reports; reading a row reads no image."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class PairRow:
    """One picture and what is said of it; fields as `prepare` wrote them."""

    caption: str
    key: str
    source: str
    keywords: tuple[str, ...] = ()
    gloss: str = ""
    seen: bool = True


class Pairs:
    """Pictures with captions.

    Attributes:
      rows: captions and the like, images left out.
      name: of the set.
      files: lists the files that hold the images, one each (None: it must not be read) or all of
        them in a few; no files: they lie elsewhere.
    """

    def __init__(
        self,
        rows: Sequence[PairRow],
        load: Callable[[int], bytes],
        *,
        name: str,
        direction: str = "image_to_text",
        members: Sequence[int] | None = None,
        paths: Sequence[str] | None = None,
        start: pathlib.Path | None = None,
        files: Callable[[], Sequence[pathlib.Path | None]] = tuple,
    ):
        if direction not in DIRECTIONS:
            raise UserError(f"unknown direction {direction!r}; known: {', '.join(DIRECTIONS)}")
        self.rows = rows
        self.name = name
        self.direction = direction
        self._load = load
        self._members = list(range(len(rows))) if members is None else list(members)
        self._paths, self._start = paths, start
        self.files = files

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Example:
        number = self._members[index]
        row = self.rows[number]
        path = self._paths[number] if self._paths else ""
        label = str(self._start / path) if self._start else f"{self.name} row {number}"
        image = ImageRef(number, label, lambda: self._load(number), path)
        others = (*row.keywords, *([row.gloss] if row.gloss else []))
        if self.direction == "image_to_text":
            return Example(
                query_image=image,
                target_text=row.caption,
                target_id=row.key.replace(" ", ""),
                set=self.name,
                other_texts=others,
            )
        return Example(
            query_text=row.caption,
            target_image=image,
            target_id=f"image {number}",
            set=self.name,
            other_texts=others,
        )

    def directed(self, direction: str) -> "Pairs":
        """Returns the same rows the other way round."""
        return self._with(direction=direction)

    def by_source(self) -> list["Pairs"]:
        """Splits into one `Pairs` per picture package; image numbers stay those of the whole."""
        names = sorted({self.rows[number].source for number in self._members})
        return [
            self._with(name=name, members=[n for n in self._members if self.rows[n].source == name])
            for name in names
        ]

    def _with(self, **changes: Any) -> "Pairs":
        """Returns the same pictures, seen another way."""
        given = {
            "name": self.name,
            "direction": self.direction,
            "members": self._members,
            "paths": self._paths,
            "start": self._start,
            "files": self.files,
        }
        return Pairs(self.rows, self._load, **{**given, **changes})

    def image(self, number: int) -> bytes:
        """Reads the encoded image `number` of the whole."""
        return self._load(number)

    def images(self) -> Iterator[bytes]:
        """Reads all encoded images, in order."""
        return (self._load(number) for number in self._members)

    def captions(self) -> list[str]:
        return [self.rows[number].caption for number in self._members]

    def texts(self, *, others: bool = True) -> list[str]:
        """Lists every text that may stand for a row, each once, captions first."""
        found = dict.fromkeys(self.captions())
        if others:
            for number in self._members:
                row = self.rows[number]
                found.update(dict.fromkeys((*row.keywords, *filter(None, [row.gloss]))))
        return list(found)


def pairs(
    path: str | os.PathLike,
    split: str = "train",
    *,
    folder: image_files.Folder | None = None,
    faults: list[str] | None = None,
) -> Pairs:
    """Opens image-caption pairs: a directory written by `prepare`, or a pairs.jsonl.

    Args:
      path: of the directory or file.
      split: of a directory; a file has "train" alone.
      folder: of a file's images; None: its own.
      faults: see `read_jsonl`.

    Raises:
      UserError: nothing readable there, no such split, a malformed line.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix == ".jsonl":
        if split != "train":
            raise UserError(f"{path} has no split {split!r}: all of its rows are for training")
        return _jsonl_pairs(path, folder or image_files.Folder(path.parent), faults)
    images = _open(path, "smol_pairs", split)
    with damage(path):
        rows = [
            PairRow(
                caption=_text(found["caption"]),
                key=_text(found["key"]),
                source=_text(found["source"]),
                keywords=tuple(map(_text, found["keywords"])),
                gloss=_text(found["gloss"]),
                seen=bool(found["seen"]),
            )
            for found in images
        ]

    def load(number: int) -> bytes:
        with damage(path):
            return images[number]["image"]

    def files() -> list[pathlib.Path]:
        return sorted((path / "smol_pairs").glob(f"*/*-{split}.*"))

    return Pairs(rows, load, name=split, files=files)


def read_jsonl(path: str | os.PathLike, faults: list[str] | None = None) -> list[dict]:
    """Reads the lines of a pairs.jsonl, {"image": path, "text": ...}.

    Args:
      path: of the file.
      faults: gets what is wrong with malformed lines, which are left out; None: the first stops.

    Raises:
      UserError: an unreadable file, no usable line, a malformed one; lines are named by number.
    """
    path = pathlib.Path(path).expanduser()
    rows = []
    for where, line in json_files.lines(path):
        try:
            rows.append(_pair(json_files.parse(line, where), where))
        except UserError as error:
            json_files.keep(faults, error)
    if not rows:
        raise UserError(f"{path}: no pairs in it" + (f"; {faults[0]}" if faults else ""))
    return rows


def _pair(row: Any, where: str) -> dict[str, Any]:
    for key in ("image", "text"):
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f'{where}: "{key}" is missing or empty')
        if key == "image" and "\0" in value:
            raise UserError(f'{where}: "{key}" has a NUL character')
    return row


def _jsonl_pairs(path: pathlib.Path, folder: image_files.Folder, faults: list[str] | None) -> Pairs:
    found = read_jsonl(path, faults)
    rows = [
        PairRow(caption=row["text"], key=text_keys.caption_key(row["text"]), source="pairs")
        for row in found
    ]
    names = [row["image"] for row in found]

    def load(number: int) -> bytes:
        return folder.read(names[number])

    def files() -> list[pathlib.Path | None]:
        return [_allowed(folder, name) for name in names]

    return Pairs(rows, load, name="pairs", paths=names, start=folder.start, files=files)


def _allowed(folder: image_files.Folder, name: str) -> pathlib.Path | None:
    try:
        return folder.path(name)
    except UserError:
        return None


def is_prepared(path: pathlib.Path) -> bool:
    """Says whether `prepare smol` has written its data there."""
    return any((path / "smol_pairs").glob("*/dataset_info.json"))


def _open(path: pathlib.Path, name: str, split: str):
    """Opens one split of a tfds directory; images stay encoded."""
    versions = sorted((path / name).glob("*/dataset_info.json"))
    if not versions:
        raise UserError(
            f"{path} holds no {name}, as `python -m unime_jax.prepare smol` writes them, and is no "
            ".jsonl with pairs or .csv of NLI"
        )
    os.environ.setdefault("TFDS_LOG_LEVEL", "error")
    import tensorflow_datasets as tfds

    with damage(path):
        builder = tfds.builder_from_directory(str(versions[-1].parent))
        if split not in builder.info.splits:
            known = ", ".join(builder.info.splits)
            raise UserError(f"{path / name} has no split {split!r}; it has {known}")
        decoders = {"image": tfds.decode.SkipDecoding()} if name == "smol_pairs" else None
        return builder.as_data_source(split, decoders=decoders)


@contextlib.contextmanager
def damage(path: pathlib.Path):
    """Turns what tfds, protobuf and array_record raise, each its own kinds, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is damaged ({reason(error)}): delete it and run prepare again"
        ) from None


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def split_sentences(path: str | os.PathLike, split: str) -> list[dict[str, str]]:
    """Reads a split of the sentences (heldout, gloss_to_example, ...) as plain dicts."""
    path = pathlib.Path(path).expanduser()
    rows = _open(path, "smol_sentences", split)
    with damage(path):
        return [{key: _text(value) for key, value in row.items()} for row in rows]


def sentences(path: str | os.PathLike, faults: list[str] | None = None) -> Sequence[str]:
    """Reads every text of stage 1, each once.

    Args:
      path: nli_for_simcse.csv, a pairs.jsonl, or a directory written by `prepare` (WordNet's
        sentences, then the training captions).
      faults: gets what is wrong with rows of a file that are left out; None: the first one stops.
    """
    path = pathlib.Path(path).expanduser()
    if nli.is_nli(path):
        return nli.read(path, faults).sentences
    if path.suffix == ".jsonl":
        return list(dict.fromkeys(row["text"] for row in read_jsonl(path, faults)))
    return distinct_texts(*stage1_rows(path))


def stage1_rows(path: str | os.PathLike) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Reads WordNet's sentences and the training captions of a directory written by `prepare`."""
    captions = split_sentences(path, "captions")
    return split_sentences(path, "train"), [row for row in captions if row["kind"] == "caption"]


def distinct_texts(*parts: Sequence[dict[str, str]]) -> list[str]:
    """Returns every text of some rows once, in their order."""
    return list(dict.fromkeys(row["text"] for part in parts for row in part))
