"""Hashes of files' contents, remembered by what the file system says of each file."""

import contextlib
import hashlib
import os
import pathlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

BYTES = 16
# Memories: of models, which every program asks for, and of images, which may be a million.
MODELS, IMAGES = "model_hashes.txt", "file_hashes.txt"
_READ = 1 << 22
_MARKS = 4  # of a file, see `FileHashes`
# Clocks of file systems tick in up to 2 s: what was written twice within one looks the same.
_TICK_NS = 2_000_000_000


class FileHashes:
    """Hashes files by content; a file that looks as before is not read again.

    What counts are its size, its number and both of its times: that of the last change cannot be
    set, as `cp -p` and `rsync -t` set the other.

    Args:
      directory: keeps what is known from one process to the next, where it can be written.
      memory: MODELS or IMAGES.
    """

    def __init__(self, directory: pathlib.Path, memory: str = IMAGES):
        self._path = directory / memory
        self._known: dict[bytes, bytes] = {}  # path -> digest and marks
        self._file = None
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):  # none there, or not to be read: files are hashed anew
            self._read()

    def _read(self) -> None:
        """Reads the memory, and writes it anew where most of it is of files that have changed."""
        lines = 0
        with open(self._path, "rb") as file:
            for lines, line in enumerate(file, 1):  # noqa: B007
                *known, path = line.split(b" ", 1 + _MARKS)
                whole = len(known) == 1 + _MARKS and len(known[0]) == 2 * BYTES
                if whole and path.endswith(b"\n"):  # else it was cut short by a kill
                    self._known[path] = b" ".join(known)
        if lines > 2 * len(self._known):
            part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
            try:
                part.write_bytes(b"".join(b"%b %b" % entry[::-1] for entry in self._known.items()))
                os.replace(part, self._path)
            except OSError:  # of a full disk: the memory stays as it is
                part.unlink(missing_ok=True)

    def __call__(self, path: pathlib.Path) -> bytes:
        """Returns 16 bytes.

        Raises:
          OSError: the file cannot be read.
        """
        stat = os.stat(path)
        times = stat.st_mtime_ns, stat.st_ctime_ns
        marks = (stat.st_size, stat.st_ino, *times)
        key = f"{str(path.absolute())!r}\n".encode()
        digest, *before = self._known.get(key, b"").decode(errors="replace").split(" ")
        if before == list(map(str, marks)):
            with contextlib.suppress(ValueError):
                return bytes.fromhex(digest)
        with open(path, "rb") as file:
            digest = hashlib.blake2b(digest_size=BYTES)
            while block := file.read(_READ):
                digest.update(block)
        if time.time_ns() - max(times) > _TICK_NS:
            self._known[key] = " ".join(map(str, (digest.hexdigest(), *marks))).encode()
            self._remember(key)
        return digest.digest()

    def _remember(self, key: bytes) -> None:
        with self._lock:
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (see close)
                # One short line in one write: those of several processes do not mix.
                self._file.write(self._known[key] + b" " + key)
            except OSError:  # no place to keep it: the next process reads the file again
                return

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def of_files(paths: Sequence[pathlib.Path], directory: pathlib.Path) -> list[bytes]:
    """Hashes files of models, several at a time; see `FileHashes`."""
    with contextlib.closing(FileHashes(directory, MODELS)) as hashes, ThreadPoolExecutor(4) as pool:
        return list(pool.map(hashes, paths))


def of_bytes(content: bytes) -> bytes:
    """Returns 16 bytes, those of a file with this content."""
    return hashlib.blake2b(content, digest_size=BYTES).digest()
