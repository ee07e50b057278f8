"""Reads MMEB-train as published (parquet and image files) and writes it set by set.

A row that cannot be used (image missing or damaged, a side empty, a path that leaves the image
root) is left out, counted, and listed in the set's `skipped.jsonl`.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from unime_jax.data import image_files, mmeb_sets, pictures
from unime_jax.types import UserError, reason

SKIPPED, SUMMARY, SIDES = "skipped.jsonl", "prepared.json", "has_image.npy"
FORMAT = 1  # raise it when what is written changes: sets are then written anew
_ROWS_AT_ONCE = 256
_SLOT = "<|image_1|>"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the content of a prepared set.

    Attributes:
      split: one of `mmeb_sets.SPLITS`.
      rows_per_set: the first so many rows of the files are read; 0: all.
      decode: whether every image is decoded once, to find damaged ones; else its header is read.
      max_bad_share: of the rows read, how many may be left out, 0 to 1.
      image_root: directory that no image's path leaves; "": the images' own.
    """

    split: str = "original"
    rows_per_set: int = mmeb_sets.ROWS_PER_SET
    decode: bool = True
    max_bad_share: float | int = 0.01
    image_root: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was made of a set.

    Attributes:
      rows: read; pairs: written; images: written, each content once.
      missing_images, unreadable_images, empty_pairs, refused_paths: rows left out, by reason.
      repeated_images: places of an image that another place had brought already.
    """

    rows: int
    pairs: int
    images: int
    missing_images: int = 0
    unreadable_images: int = 0
    empty_pairs: int = 0
    refused_paths: int = 0
    repeated_images: int = 0

    @property
    def bad(self) -> int:
        return self.rows - self.pairs


class _Bad(Exception):
    """A row that cannot be used: which counter of `Summary`, why, and what file would mend it."""

    def __init__(self, reason: str, problem: str, missing: str = ""):
        super().__init__(problem)
        self.reason, self.missing = reason, missing


def parquet_files(source: pathlib.Path, name: str, split: str) -> list[pathlib.Path]:
    """Lists the files of a set's split.

    Raises:
      UserError: there are none.
    """
    if not source.is_dir():
        raise UserError(f"--source {source}: no such directory; give the copy of MMEB-train")
    found = sorted((source / name).glob(f"{split}-*.parquet"))
    found = found or sorted((source / name).glob(f"{split}.parquet"))
    if not found:
        raise UserError(
            f"{source / name} holds no {split}-*.parquet; sets and splits are those of "
            "TIGER-Lab/MMEB-train (--sets leaves sets out, --split names the split)"
        )
    return found


def count_rows(files: list[pathlib.Path], cap: int) -> int:
    """Counts the rows that will be read; `cap` 0 means all."""
    total = sum(_parquet(path).metadata.num_rows for path in files)
    return min(total, cap) if cap else total


def prepare(
    name: str,
    source: pathlib.Path,
    images: pathlib.Path,
    output: pathlib.Path,
    settings: Settings,
    progress: Callable[[int], None] = lambda rows: None,
    *,
    again: bool = False,
) -> Summary:
    """Writes one set to `output`/`name`, unless it is there already.

    Args:
      name: of the set.
      source: copy of MMEB-train.
      images: root that the rows' image paths start from.
      output: directory of all prepared sets.
      settings: see `Settings`.
      progress: called with the number of rows just read.
      again: a set that is there is replaced.

    Raises:
      UserError: files missing or not as published, more bad rows than the settings allow.
    """
    from unime_jax.data import mmeb_builder  # with tfds, which training does not need

    files = parquet_files(source, name, settings.split)
    wanted = _wanted(files, settings)
    done = None if again else _read_summary(output / name, wanted)
    if done is not None:
        progress(done.rows)
        return done
    scratch = output / f".{name}.part"  # of an interrupted run, if it is there
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    rows = _rows(files, settings.rows_per_set)
    reader = _Reader(rows, _folder(images, settings), settings, progress)
    try:
        mmeb_builder.write(scratch, reader.images(), reader.pairs)
    except AssertionError:  # tfds writes no empty set; why it is empty is told below
        if reader.pairs:
            raise
    shutil.rmtree(scratch / "downloads", ignore_errors=True)  # tfds makes it, empty
    summary = reader.summary()
    with open(scratch / SKIPPED, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in reader.skipped)
    if summary.bad > settings.max_bad_share * summary.rows or not summary.pairs:
        kept = output / f"{name}.{SKIPPED}"
        os.replace(scratch / SKIPPED, kept)
        shutil.rmtree(scratch)
        problem = reader.skipped[0]["problem"] if reader.skipped else "there are none"
        raise UserError(
            f"{name}: {summary.bad} of {summary.rows} rows cannot be used, more than "
            f"--max-bad-share allows; they are listed in {kept}, the first: {problem}"
        )
    content = {"wanted": wanted, "summary": dataclasses.asdict(summary), "rows": reader.digest()}
    (scratch / SUMMARY).write_text(json.dumps(content, indent=1))
    sides = [(pair.query_image >= 0, pair.target_image >= 0) for pair in reader.pairs]
    np.save(scratch / SIDES, np.array(sides, bool))
    shutil.rmtree(output / name, ignore_errors=True)
    os.replace(scratch, output / name)
    (output / f"{name}.{SKIPPED}").unlink(missing_ok=True)
    return summary


def _wanted(files: list[pathlib.Path], settings: Settings) -> dict[str, Any]:
    """Returns what a prepared set depends on; stored in it."""
    wanted = {
        "format": FORMAT,
        "files": [[path.name, path.stat().st_size] for path in files],
        **{k: v for k, v in dataclasses.asdict(settings).items() if k != "max_bad_share"},
    }
    if root := wanted.pop("image_root"):  # sets of before the key was there lack it
        wanted["image_root"] = os.path.realpath(pathlib.Path(root).expanduser())
    return wanted


def check_same(directory: pathlib.Path, files: list[pathlib.Path], settings: Settings) -> None:
    """Raises `UserError` where a whole set is there that was prepared in another way."""
    try:
        there = json.loads((directory / SUMMARY).read_text())["wanted"]
        is_whole = there["format"] == FORMAT and bool(_read_summary(directory, there))
    except (OSError, ValueError, KeyError, TypeError):
        return
    now = _wanted(files, settings)
    if is_whole and (other := [key for key in now | there if now.get(key) != there.get(key)]):
        told = [f"{key} {there.get(key)} there, {now.get(key)} now" for key in other]
        told = ["other files" if key == "files" else x for key, x in zip(other, told, strict=True)]
        raise UserError(
            f"{directory} was prepared in another way ({'; '.join(told)}): --again replaces it, or "
            "choose another --output"
        )


def _read_summary(directory: pathlib.Path, wanted: dict) -> Summary | None:
    try:
        found = json.loads((directory / SUMMARY).read_text())
        return Summary(**found["summary"]) if found["wanted"] == wanted else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def come(directory: pathlib.Path, images: pathlib.Path, settings: Settings) -> int:
    """Counts the images, missing or damaged when a set was prepared, that can be read by now."""
    paths = {}
    with contextlib.suppress(OSError, ValueError), open(directory / SKIPPED, "rb") as file:
        for line in map(json.loads, file):
            paths[line.get("missing", "") if isinstance(line, dict) else ""] = None
    reader = _Reader(iter(()), _folder(images, settings), settings, None)
    return sum(isinstance(reader._load(path), bytes) for path in paths if path)


def _folder(images: pathlib.Path, settings: Settings) -> image_files.Folder:
    return image_files.Folder(images, settings.image_root or None, option="--image-root")


def _parquet(path: pathlib.Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path}: not a readable parquet file ({reason(error)}); fetch it again"
        ) from None


def _rows(files: list[pathlib.Path], cap: int) -> Iterator[dict[str, str]]:
    """Yields the first `cap` rows (0: all), empty cells as ""."""
    import pyarrow

    left = cap or None
    wanted = [column for column in mmeb_sets.COLUMNS if not column.startswith("neg")]
    for path in files:
        file = _parquet(path)
        missing = [column for column in wanted if column not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path}: no column {', '.join(missing)}; is it a file of MMEB-train?")
        try:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                for row in batch.to_pylist():
                    if left == 0:
                        return
                    left = None if left is None else left - 1
                    yield {key: value or "" for key, value in row.items()}
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} is damaged ({reason(error)}); fetch it again") from None


class _Reader:
    """Reads the images of rows, some rows at a time, and makes pairs of what is usable.

    Attributes:
      pairs: of the rows whose images have passed.
      skipped: a dict for each row left out.
    """

    def __init__(self, rows, images: image_files.Folder, settings: Settings, progress):
        self._images = images
        self._rows_left = rows
        self._decode, self._progress = settings.decode, progress
        self._by_content: dict[str, int] = {}  # hash of an image -> its number
        self._by_path: dict[str, str] = {}  # path of an image -> its hash
        self._read, self._repeated = 0, 0
        self._reasons = dict.fromkeys(
            ("missing_images", "unreadable_images", "empty_pairs", "refused_paths"), 0
        )
        self.pairs: list[mmeb_sets.Pair] = []
        self.skipped: list[dict] = []

    def images(self) -> Iterator[bytes]:
        """Yields every image once; afterwards `pairs` is complete."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            while rows := self._next_rows():
                paths = dict.fromkeys(path for row in rows for path in _paths(row) if path)
                fresh = [path for path in paths if path not in self._by_path]
                found = dict(zip(fresh, pool.map(self._load, fresh), strict=True))
                for row in rows:
                    yield from self._take(row, found)
                    self._read += 1
                self._progress(len(rows))

    def _next_rows(self) -> list[dict[str, str]]:
        return list(itertools.islice(self._rows_left, _ROWS_AT_ONCE))

    def _take(self, row: dict[str, str], found: dict[str, bytes | _Bad]) -> Iterator[bytes]:
        """Adds a row's pair; yields those of its images that are new."""
        try:
            _check(row)
            for path in filter(None, _paths(row)):
                if isinstance(found.get(path), _Bad):
                    raise found[path]
        except _Bad as bad:
            self._reasons[bad.reason] += 1
            line = {"row": self._read, "problem": str(bad), "missing": bad.missing}
            self.skipped.append({**line, **{key: row[key][:200] for key in row}})
            return
        numbers = []
        for path in _paths(row):
            if not path:
                numbers.append(-1)
                continue
            digest = self._by_path.get(path)
            if digest is None:
                digest = self._by_path[path] = _digest(found[path])
            if digest not in self._by_content:
                self._by_content[digest] = len(self._by_content)
                yield found[path]
            else:
                self._repeated += 1
            numbers.append(self._by_content[digest])
        image = self._by_path[row["pos_image_path"]] if row["pos_image_path"] else ""
        key = _digest(f"{row['pos_text']}\0{image}".encode())
        self.pairs.append(
            mmeb_sets.Pair(row["qry"], numbers[0], row["pos_text"], numbers[1], key, self._read)
        )

    def _load(self, path: str) -> bytes | _Bad:
        """Reads an image file and looks whether it is one."""
        try:
            content = self._images.read(path)
        except image_files.Outside as error:
            return _Bad("refused_paths", str(error))
        except image_files.Missing as error:
            return _Bad("missing_images", str(error), path)
        except UserError as error:
            return _Bad("unreadable_images", str(error), path)
        try:
            if self._decode:
                # A small scale does: every byte of the file is read all the same.
                pictures.open_rgb(content, path, at_least=32)
            else:
                pictures.size_of(content)
        except UserError as error:
            return _Bad("unreadable_images", str(error), path)
        return content

    def digest(self) -> str:
        """Is equal where all pairs are, the content of their images included."""
        found = hashlib.blake2b("".join(self._by_content).encode(), digest_size=16)
        for pair in self.pairs:
            found.update(repr(dataclasses.astuple(pair)).encode())
        return found.hexdigest()

    def summary(self) -> Summary:
        return Summary(
            rows=self._read,
            pairs=len(self.pairs),
            images=len(self._by_content),
            repeated_images=self._repeated,
            **self._reasons,
        )


def _paths(row: dict[str, str]) -> tuple[str, str]:
    return row["qry_image_path"], row["pos_image_path"]


def _check(row: dict[str, str]) -> None:
    """Refuses a row of which a side says nothing, or misses the image that its text speaks of."""
    for side, text, path in (
        ("query", row["qry"], row["qry_image_path"]),
        ("target", row["pos_text"], row["pos_image_path"]),
    ):
        if not path and not text.replace(_SLOT, "").strip():
            raise _Bad("empty_pairs", f"the {side} has neither text nor image")
        if not path and _SLOT in text:
            raise _Bad("missing_images", f"the {side}'s text has {_SLOT} but there is no image")


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
