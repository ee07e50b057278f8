"""Image files that rows name: read below one directory, and nothing else.

Rows are data: whoever wrote them need not be whoever reads them, and what they name ends up in
vectors and reports. No path leads out of the image root, by "..", by being absolute, or by a
symbolic link; nothing is downloaded, no escape such as %2e is undone.
"""

import functools
import os
import pathlib
import re
import stat

from unime_jax.types import UserError

MAX_BYTES = 1 << 29  # of an encoded image: 100 MP of 16-bit RGB take no more when not compressed


OUTSIDE = "leaves the image root"


class Missing(UserError):
    """There is no such image."""

    kind = "missing"


class Outside(UserError):
    """The path leaves the image root."""

    kind = "outside the image root"


def is_remote(name: str) -> bool:
    """Says whether this is an address of something elsewhere, as http://, s3:// and the like."""
    return re.match(r"(?!file:)[a-zA-Z][a-zA-Z0-9+.-]+://", name) is not None


class Folder:
    """Where the images of a file's rows lie.

    Args:
      start: directory that relative paths start from.
      root: directory that no path leaves; None: `start`.
      option: what the user sets to choose another root, for messages; "": nothing.

    Raises:
      UserError: there is no such root.
    """

    def __init__(
        self,
        start: str | os.PathLike,
        root: str | os.PathLike | None = None,
        *,
        option: str = "",
    ):
        self.start = pathlib.Path(start).expanduser()
        self.root = self.start if root is None else pathlib.Path(root).expanduser()
        if root is not None and not self.root.is_dir():
            raise UserError(f"{option or 'image root'} {root}: no such directory")
        self._inside = os.path.realpath(self.root)
        self._option = option
        # The files of a folder share it: one look at each file is left.
        self._real_folder = functools.lru_cache(maxsize=1 << 12)(os.path.realpath)

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "_real_folder"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._real_folder = functools.lru_cache(maxsize=1 << 12)(os.path.realpath)

    def path(self, name: str) -> pathlib.Path:
        """Returns the path of an image, which need not be there.

        Raises:
          UserError: it leads out of the root, names no regular file, or is no path.
        """
        if is_remote(name):
            raise Outside(f"{_short(name)}: pictures are not downloaded; give a path")
        try:
            path = os.path.join(self.start, os.path.expanduser(name.removeprefix("file://")))
            if "\\" in name and not os.path.lexists(path):  # written on Windows
                path = os.path.join(self.start, name.replace("\\", "/"))
            real = self._real(path)
            mode = os.stat(real).st_mode if self._contains(real) else 0
        except FileNotFoundError:
            return pathlib.Path(path)
        except (OSError, ValueError) as error:  # a NUL or half a surrogate pair in it, a loop
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"{_short(name)!r}: no path of an image ({reason})") from None
        if not mode:
            raise Outside(self._refusal(name, path, real))
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening one may wait for ever
            raise UserError(f"{_short(name)}: no file but a pipe, socket or device")
        return pathlib.Path(path)

    def read(self, name: str) -> bytes:
        """Reads an image file.

        Raises:
          UserError: it is not there, cannot be read, or must not be.
        """
        return read_file(self.path(name))

    def _real(self, path: str) -> str:
        folder, name = os.path.split(path)
        real = os.path.join(self._real_folder(folder), name)
        plain = name not in ("", ".", "..") and not os.path.islink(real)
        return real if plain else os.path.realpath(real)

    def _refusal(self, name: str, path: str, real: str) -> str:
        """Says how a path leaves the root; links, as data sets are often laid out, are told."""
        root = os.path.abspath(self.root)
        by, hint = "", f"{self._option} chooses another root" if self._option else ""
        if os.path.commonpath([root, os.path.abspath(path)]) == root:
            by = f" by a link to {_short(os.fsencode(real).decode(errors='replace'))}"
            hint += f", {os.path.commonpath([self._inside, real])} holds both" if hint else ""
        return f"{_short(name)}: {OUTSIDE} {self._inside}{by}, not read" + f" ({hint})" * bool(hint)

    def _contains(self, real: str) -> bool:
        return os.path.commonpath([self._inside, real]) == self._inside


class Named(str):
    """Is the path of an image that a row names; whoever opens it asks `folder` first."""

    folder: Folder

    def __new__(cls, path: str, folder: Folder):
        named = super().__new__(cls, path)
        named.folder = folder
        return named

    def checked(self) -> pathlib.Path:
        """Returns the path; raises as `Folder.path` does."""
        return self.folder.path(self)


def read_file(path: pathlib.Path) -> bytes:
    """Reads an image file.

    Raises:
      UserError: it is not there, cannot be read, or is larger than any image that is decoded.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= MAX_BYTES:
                return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Missing(f"{path}: cannot be read (no such image)") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: cannot be read ({reason})") from None
    raise UserError(f"{path}: {size >> 20} MiB; of {MAX_BYTES >> 20} or more no image is read")


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}..."
