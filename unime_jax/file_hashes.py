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
_MEMORY = "file_hashes.txt"
_READ = 1 << 22
# Clocks of file systems tick in up to 2 s: what was written twice within one looks the same.
_TICK_NS = 2_000_000_000


class FileHashes:
    """Hashes files by content; a file that looks as before is not read again.

    What counts are its size, its number and both of its times: that of the last change cannot be
    set, as `cp -p` and `rsync -t` set the other.

    Args:
      directory: keeps what is known from one process to the next, where it can be written.
    """

    def __init__(self, directory: pathlib.Path):
        self._path = directory / _MEMORY
        self._known: dict[str, bytes] = {}
        self._file = None
        self._lock = threading.Lock()
        text = ""
        with contextlib.suppress(OSError):  # none there, or not to be read: files are hashed anew
            text = self._path.read_text(errors="replace")
        for line in text.splitlines():
            digest, _, key = line.partition(" ")
            if len(digest) == 2 * BYTES and key:  # a line cut short by a kill is not
                with contextlib.suppress(ValueError):
                    self._known[key] = bytes.fromhex(digest)

    def __call__(self, path: pathlib.Path) -> bytes:
        """Returns 16 bytes.

        Raises:
          OSError: the file cannot be read.
        """
        stat = os.stat(path)
        times = stat.st_mtime_ns, stat.st_ctime_ns
        marks = " ".join(map(str, (stat.st_size, stat.st_ino, *times)))
        key = f"{marks} {str(path.absolute())!r}"
        if key in self._known:
            return self._known[key]
        with open(path, "rb") as file:
            digest = hashlib.blake2b(digest_size=BYTES)
            while block := file.read(_READ):
                digest.update(block)
        if time.time_ns() - max(times) > _TICK_NS:
            self._known[key] = digest.digest()
            self._remember(key)
        return digest.digest()

    def _remember(self, key: str) -> None:
        with self._lock:
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (see close)
                # One short line in one write: those of several processes do not mix.
                self._file.write(f"{self._known[key].hex()} {key}\n".encode())
            except OSError:  # no place to keep it: the next process reads the file again
                return

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def of_files(paths: Sequence[pathlib.Path], directory: pathlib.Path) -> list[bytes]:
    """Hashes files, several at a time; see `FileHashes`."""
    with contextlib.closing(FileHashes(directory)) as hashes, ThreadPoolExecutor(4) as pool:
        return list(pool.map(hashes, paths))


def of_bytes(content: bytes) -> bytes:
    """Returns 16 bytes, those of a file with this content."""
    return hashlib.blake2b(content, digest_size=BYTES).digest()
