"""Reads what is to be embedded, row by row: JSON lines, Parquet, a folder of pictures, stdin."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import pathlib
import select
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from unime_jax.data import image_files, parquet_rows, vector_files
from unime_jax.types import UserError, reason

# What Pillow takes the names of `pictures.FORMATS` to end in.
PICTURES = (
    ".apng", ".avif", ".avifs", ".bmp", ".bw", ".dib", ".gif", ".icb", ".ico", ".j2c", ".j2k",
    ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx",
    ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".rgb", ".rgba", ".sgi", ".tga", ".tif",
    ".tiff", ".vda", ".vst", ".webp",
)  # fmt: skip
SHEET = ".search.png"  # what the name of a file of vectors ends in for the sheet of a search
_SHEETS = tuple(suffix + SHEET for suffix in vector_files.SUFFIXES)
_LINES = (".jsonl", ".ndjson")
_WAIT = 0.5  # seconds between looks at whether to go on waiting for stdin
LETTERS = 4096  # of an id or a path: .npz has strings of one length alone, that of the longest
_ROWS = 64  # of a Parquet file at a time: they may hold images
_LINE = 1 << 26  # bytes; a longer line is not held


@dataclasses.dataclass(frozen=True)
class Keys:
    """Names of the columns of Parquet files, and of the keys of JSON lines."""

    id: str = "id"
    text: str = "text"
    image: str = "image"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the input.

    Attributes:
      row: its number, from 0.
      id: the user's, or its number; of a picture in a folder its path there.
      text, image: None where the row has none; an image is a path or encoded bytes.
      label: what the image is called; a path, if it is one, is relative to `Input.folder`.
      fault: why the row cannot be read, "" if it can.
    """

    row: int
    id: str
    text: str | None = None
    image: str | bytes | None = None
    label: str = ""
    fault: str = ""

    @property
    def digest(self) -> str:
        """Tells rows apart: 16 hex digits of all that the row says."""
        image = self.image or b""
        if isinstance(image, str):  # as the row calls it: inputs and their pictures may be moved
            image = os.fsencode(self.label or image)
        parts = (self.id.encode(), repr(self.text).encode(), image, self.fault.encode())
        found = hashlib.blake2b(digest_size=8)
        for part in parts:
            found.update(len(part).to_bytes(8, "little") + part)
        return found.hexdigest()


class Input:
    """What a command line names as its input.

    Iterating yields an Entry for every row, in order; a row that cannot be read is one with a
    fault. Blank lines are no rows.

    Args:
      name: path of a .jsonl or .parquet file or of a folder, or "-" for JSON lines on stdin.
      keys: names of the columns.
      image_root: directory that no image's path leaves; "": `folder`.

    Attributes:
      left_out: files of a folder whose names are no picture's, once it was counted or read.

    Raises:
      UserError: it is not there, or of another kind.
    """

    def __init__(self, name: str, keys: Keys = Keys(), *, image_root: str = ""):
        self.name, self._keys = name, keys
        self.left_out = 0
        # Absolute, as a picture's path then is: a relative one would begin at `folder` again.
        self.path = pathlib.Path(name).expanduser().absolute()
        self._kind = self._find_kind()
        self._images = image_files.Folder(self.folder, image_root or None, option="--image-root")

    def _find_kind(self) -> str:
        if self.name == "-":
            if sys.stdin is None:  # as `<&-` starts it
                raise UserError("--input -: stdin is closed; pipe JSON lines into it")
            return "stdin"
        if not self.path.exists():
            raise UserError(f"{self.name}: no such file or folder")
        if self.path.is_dir():
            return "folder"
        if self.path.suffix.lower() in _LINES or not stat.S_ISREG(self.path.stat().st_mode):
            return "lines"
        if self.path.suffix.lower() == ".parquet":
            return "parquet"
        raise UserError(
            f"{self.name}: an input is a .jsonl file (lines of "
            '{"id": ..., "text": ..., "image": path}), a .parquet file, a folder of pictures, or - '
            "for JSON lines on stdin"
        )

    @property
    def folder(self) -> pathlib.Path:
        """Is where relative paths of images begin."""
        if self._kind == "stdin":
            return pathlib.Path.cwd()
        return self.path if self._kind == "folder" else self.path.parent

    def describe_left_out(self) -> str:
        """Says how many files were passed over; "" where none was."""
        if not self.left_out:
            return ""
        return f"files left out of {self.name}, by the ends of their names: {self.left_out}"

    @property
    def is_repeatable(self) -> bool:
        """Whether it can be read a second time."""
        return self._kind != "stdin" and (self.path.is_dir() or self.path.is_file())

    def count(self) -> int | None:
        """Counts the rows without parsing them; None where only reading them all would tell.

        Raises:
          UserError: a folder without pictures, a file without rows, a Parquet file that is damaged
            or has other columns.
        """
        if not self.is_repeatable:
            return None
        if self._kind == "folder":
            return sum(1 for _ in self._walk()) or self._no_pictures()
        if self._kind == "parquet":
            file = self._parquet()
            self._columns(file)
            return file.metadata.num_rows or self._no_rows()
        with open(self.path, "rb") as file:
            return sum(1 for line in _bounded(file) if line.strip(_BLANK)) or self._no_rows()

    def __iter__(self) -> Iterator[Entry]:
        return self.read()

    def read(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Entry]:
        """Yields the rows; `stopped` ends a wait for the next line of stdin."""
        if self._kind == "folder":
            return self._pictures()
        if self._kind == "parquet":
            return self._table()
        return self._lines(stopped)

    # ---- folders

    def _walk(self) -> Iterator[tuple[str, str]]:
        """Yields paths of pictures; those of folders that are not entered with the reason.

        A folder is walked once, under its own name if it lies in the input, outside of hidden ones:
        links to folders are followed to others alone, inside the image root.
        """
        self.left_out = 0
        folders, walked, own = [str(self.path)], set(), os.path.realpath(self.path)
        while folders:
            folder = folders.pop()
            try:
                real = os.path.realpath(folder)
                if folder != str(self.path) and os.path.islink(folder):
                    inside = real == own or real.startswith(os.path.join(own, ""))
                    if inside and "/." not in real.removeprefix(own):
                        continue
                    self._images.path(folder)
                found = [] if real in walked else sorted(os.scandir(folder), key=lambda x: x.name)
            except (OSError, UserError) as error:
                is_ours = isinstance(error, UserError)
                yield folder, str(error) if is_ours else f"cannot be read ({error.strerror})"
                continue
            walked.add(real)
            found = [entry for entry in found if not entry.name.startswith(".")]
            inner = [_is_folder(entry) for entry in found]
            for entry in itertools.compress(found, map(operator.not_, inner)):
                name = entry.name.lower()
                if name.endswith(PICTURES) and not name.endswith(_SHEETS):
                    yield entry.path, ""
                else:
                    self.left_out += 1
            folders += [entry.path for entry in itertools.compress(found[::-1], inner[::-1])]

    def _pictures(self) -> Iterator[Entry]:
        row = -1
        for row, (path, fault) in enumerate(self._walk()):
            # A name may hold any bytes.
            name = os.fsencode(os.path.relpath(path, self.path)).decode(errors="replace")
            if fault:
                yield Entry(row, name, fault=fault)
            else:
                yield Entry(row, name, image=image_files.Named(path, self._images), label=name)
        if row < 0:
            self._no_pictures()

    def _no_pictures(self) -> NoReturn:
        others = f"; its {self.left_out} files end otherwise" if self.left_out else ""
        raise UserError(f"{self.name}: no pictures in this folder (.jpg, .png, ...){others}")

    def _no_rows(self) -> NoReturn:
        raise UserError(f"{self.name}: no rows in this file")

    # ---- JSON lines

    def _lines(self, stopped: Callable[[], bool]) -> Iterator[Entry]:
        with contextlib.ExitStack() as stack:
            if self._kind == "stdin":
                file = _lines_of(sys.stdin.fileno(), stopped)
            else:
                file = _bounded(stack.enter_context(open(self.path, "rb")))
            lines = ((n, line) for n, line in enumerate(file, 1) if line.strip(_BLANK))
            for row, (number, line) in enumerate(lines):
                yield self._entry(row, number, line)

    def _entry(self, row: int, number: int, line: bytes) -> Entry:
        fault = ""
        if len(line) > _LINE:
            return Entry(row, str(row), fault=f"line {number} has more than {_LINE >> 20} MiB")
        try:
            content = json.loads(line.strip(_BLANK).decode("utf-8"))
        except json.JSONDecodeError as error:
            fault = f"line {number} is not JSON: {error.msg} at its letter {error.colno}"
        except (ValueError, RecursionError) as error:
            fault = f"line {number} is not JSON: {error}"
        else:
            if not isinstance(content, dict):
                fault = f'line {number} is {_kind(content)}, not {{"text": ..., "image": path}}'
        return Entry(row, str(row), fault=fault) if fault else self._read(row, content)

    # ---- Parquet

    def _parquet(self):
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{self.name}: cannot be read as Parquet ({reason(error)})") from None

    def _columns(self, file) -> list[str]:
        """Returns the columns that are read."""
        try:
            there = file.schema_arrow.names
        except UnicodeDecodeError:
            raise UserError(f"{self.name}: a column's name is not UTF-8") from None
        keys = dataclasses.astuple(self._keys)
        columns = [name for name in keys if name in there]
        if not {self._keys.text, self._keys.image} & set(columns):
            raise UserError(
                f"{self.name}: neither a column {self._keys.text!r} nor {self._keys.image!r}; it "
                f"has {', '.join(there)}: name them with --text-key and --image-key"
            )
        return columns

    def _table(self) -> Iterator[Entry]:
        import pyarrow

        file = self._parquet()
        batches = file.iter_batches(_ROWS, columns=self._columns(file))
        count = itertools.count()
        try:
            for batch in batches:
                for content in parquet_rows.dicts(batch):
                    yield self._read(next(count), content)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{self.name}: damaged after row {next(count)} ({reason(error)})"
            ) from None

    # ---- a row

    def _read(self, row: int, content: dict[str, Any]) -> Entry:
        """Checks a row, whatever it came from; NaN is what tables have where nothing is."""
        content = {k: None if isinstance(v, float) and v != v else v for k, v in content.items()}
        id = content.get(self._keys.id)
        text = content.get(self._keys.text)
        image, label = content.get(self._keys.image), ""
        if broken := parquet_rows.broken(content):
            return Entry(row, str(row), fault=f"{broken} is not UTF-8")
        name = str(row) if id is None else str(id)
        if isinstance(image, dict):  # as Hugging Face's data sets keep images
            label = str(image.get("path") or "")
            image = image.get("bytes") or image.get("path")
        fault = ""
        if isinstance(id, list | dict | bool):
            fault = f"{self._keys.id} is {_kind(id)}; give a string or a number"
        elif text is not None and not isinstance(text, str):
            fault = f"{self._keys.text} is {_kind(text)}, not a string"
        elif not all(map(_is_unicode, (text, name, image, label))):
            fault = "half a surrogate pair in it, which is no character"
        for kind, value in ((self._keys.id, name), (self._keys.image, image or label)):
            if isinstance(value, str) and len(value) > LETTERS:
                fault = fault or f"{kind} has {len(value)} letters; {LETTERS} are the most"
            if isinstance(value, str) and "\0" in value:
                fault = fault or f"{kind} has a NUL character"
        if isinstance(image, str) and image:
            label = image.removeprefix("file://")
            image = image_files.Named(_absolute(label, self.folder), self._images)
        elif isinstance(image, bytes):
            label = label or f"image of row {row}"
        elif image is not None and image != "":
            fault = fault or f"{self._keys.image} is {_kind(image)}, not a path"
        if not fault and not text and not image:
            fault = self._nothing(content)
        if isinstance(image, str) and image_files.is_remote(image):
            fault = fault or f"{image}: pictures are not downloaded; give a path"
        if fault:
            name, fault = (x.encode(errors="replace").decode() for x in (name, fault))
            return Entry(row, name[:LETTERS], fault=fault)
        return Entry(row, name, text or None, image or None, label)

    def _nothing(self, content: dict[str, Any]) -> str:
        """Says why a row has neither text nor image."""
        wanted = (self._keys.text, self._keys.image)
        if there := [key for key in wanted if key in content]:
            return f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} empty"
        others = ", ".join([key for key in content if key != self._keys.id][:5])
        return f"neither {' nor '.join(wanted)}" + f" among {others}" * bool(others)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _lines_of(fd: int, stopped: Callable[[], bool]) -> Iterator[bytes]:
    """Yields the lines of a pipe, until it ends or `stopped` is true while it has nothing."""
    parts: list[bytes] = []  # of a line without an end so far
    while True:
        while not select.select([fd], [], [], _WAIT)[0]:
            if stopped():
                return
        if not (block := os.read(fd, 1 << 20)):
            break
        *lines, rest = block.split(b"\n")
        for line in lines:
            yield b"".join([*parts, line])
            parts = []
        if sum(map(len, parts)) <= _LINE:  # of a longer line no more is held
            parts.append(rest)
    if any(parts):
        yield b"".join(parts)


def _bounded(file) -> Iterator[bytes]:
    """Yields the lines of a file; of one of more than _LINE bytes, the start."""
    while line := file.readline(_LINE + 1):
        yield line
        while len(line) > _LINE and not line.endswith(b"\n"):
            line = file.readline(_LINE + 1)


_BLANK = b" \t\r\n\xef\xbb\xbf"


def _absolute(image: str, folder: pathlib.Path) -> str:
    if image_files.is_remote(image):
        return image
    return os.path.join(folder, os.path.expanduser(image))


def _is_unicode(value) -> bool:
    try:
        return not isinstance(value, str) or bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _kind(value) -> str:
    names = {list: "a list", dict: "an object", bool: "true or false", bytes: "binary"}
    names |= {str: "a string", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
