"""Fetches packages once, checks them, and reads files out of them where they lie."""

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator

from unime_jax.types import UserError

MAX_BYTES = 1 << 30  # of one file in a package; the largest that is read has 145 MB
_MAX_TOTAL = 1 << 34  # of all files of a package


@dataclasses.dataclass(frozen=True)
class Package:
    """One package of a public registry.

    Attributes:
      name: its name in the registry.
      registry: "pypi" or "debian".
      version: exact for PyPI; for Debian the version that `sha256` and `size` were taken from,
        the distribution decides what is fetched.
      sha256: of the file of that version.
      size: of that file, in bytes.
      licence: of its content, for the report.
    """

    name: str
    registry: str
    version: str
    sha256: str
    size: int
    licence: str


class Cache:
    """Keeps fetched packages in one folder, with a record of what was checked.

    A package is downloaded to a scratch folder and moved into place after its checksum was
    taken: an interrupted fetch leaves nothing half-done in place, what came of it is gone on
    with where the client can, and nothing is fetched twice. One process at a time: a lock tells
    the second one to wait.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)
        self._record_path = self.directory / "checksums.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.directory}: a file is in the way of this directory") from None
        self._lock = open(self.directory / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"another process is preparing {self.directory}: wait for it") from None

    def close(self) -> None:
        """Lets go of the lock."""
        self._lock.close()

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def path(self, package: Package) -> pathlib.Path | None:
        """Finds the package's file if it was fetched before.

        Raises:
          UserError: the file is not what it was.
        """
        entry = (read_json(self._record_path) or {}).get(package.name)
        path = self.directory / entry["file"] if entry else None
        if path is not None and path.exists():
            if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                raise UserError(
                    f"{path} does not match its checksum (damaged?): delete it and run again"
                )
            return path
        # A file put here by hand, or moved into place just before a crash, is as good.
        for path in self.directory.glob(f"{package.name.replace('-', '[-_]')}[-_]*"):
            if path.suffix in (".whl", ".deb") and sha256(path) == package.sha256:
                return self._keep(package, path)
        return None

    def fetch(
        self, package: Package, progress: Callable[[int], None] | None = None
    ) -> pathlib.Path:
        """Downloads the package unless it is here.

        Args:
          package: what to fetch.
          progress: called with the bytes here so far, every now and then.

        Raises:
          UserError: no connection, no apt-get, another content than expected.
        """
        path = self.path(package)
        if path is not None:
            return path
        scratch = self.directory / f".fetch-{package.name}"
        scratch.mkdir(exist_ok=True)
        if package.registry == "pypi":
            shutil.rmtree(scratch)  # pip does not go on with half a file
            scratch.mkdir()
            self._pip(package, scratch, progress)
        else:
            self._apt(package, scratch, progress)
        files = [path for path in scratch.iterdir() if path.suffix in (".whl", ".deb")]
        if len(files) != 1:
            shutil.rmtree(scratch)
            raise UserError(f"fetching {package.name} left {len(files)} files instead of one")
        self._check(package, files[0])
        target = self.directory / files[0].name
        os.replace(files[0], target)
        shutil.rmtree(scratch)
        return self._keep(package, target)

    def _check(self, package: Package, path: pathlib.Path) -> None:
        """Compares a fetched file with the expected checksum; removes it if it differs."""
        # apt has checked a .deb against the distribution's signed lists; another distribution
        # has another version, so only the known version must match.
        version = re.search(r"_([^_]+)_", path.name.replace("%3a", ":"))
        if package.registry == "debian" and version and version.group(1) != package.version:
            return
        digest = sha256(path)
        if digest != package.sha256:
            path.unlink()
            raise UserError(
                f"{path.name} has sha256 {digest[:12]}..., expected {package.sha256[:12]}...: "
                "removed it; run again, and check the package index if it happens twice"
            )

    def _keep(self, package: Package, path: pathlib.Path) -> pathlib.Path:
        record = read_json(self._record_path) or {}
        entry = {"file": path.name, "size": path.stat().st_size, "sha256": sha256(path)}
        write_json(self._record_path, {**record, package.name: entry})
        return path

    def _pip(self, package: Package, scratch: pathlib.Path, progress) -> None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch)]
        command.append(f"{package.name}=={package.version}")
        _run(command, f"pip download {package.name}", scratch, progress)

    def _apt(self, package: Package, scratch: pathlib.Path, progress) -> None:
        if not apt_available():
            raise UserError(
                f"{package.name} is a Debian package and there is no apt-get here: "
                "give image-caption pairs of your own with --pairs pairs.jsonl"
            )
        options = ["-qq"]
        if os.geteuid() == 0:  # apt's own user may not enter the cache directory
            options += ["-o", "APT::Sandbox::User=root"]

        def download(*lists):
            command = ["apt-get", *options, *lists, "download", package.name]
            _run(command, f"apt-get download {package.name}", scratch, progress)

        try:
            download()
        except UserError:  # the machine's package lists are missing or too old
            download(*self._own_lists(options))

    def _own_lists(self, options: list[str]) -> list[str]:
        """Fetches the package lists into the cache, once a day, and points apt at them.

        The machine's own lists are left alone: no root is needed, nothing is changed.
        """
        state = self.directory / "apt"
        own = ["-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
        stamp = state / "updated"
        if not stamp.exists() or time.time() - stamp.stat().st_mtime > 24 * 3600:
            for folder in ("lists/partial", "cache/archives/partial"):
                (state / folder).mkdir(parents=True, exist_ok=True)
            _run(["apt-get", *options, *own, "update"], "apt-get update", state)
            stamp.touch()
        return own


def apt_available() -> bool:
    return all(map(shutil.which, ("apt-get", "apt-cache", "dpkg-deb")))


def read_wheel(path: pathlib.Path, suffix: str) -> bytes:
    """Reads the one file of a wheel whose name ends in `suffix`; nothing is unpacked to disk."""
    try:
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(suffix)]
            if len(names) != 1:
                raise UserError(f"{path} holds {len(names)} files named *{suffix}, expected one")
            with wheel.open(names[0]) as file:
                content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:  # whatever the header says
                raise UserError(f"{path}: {names[0]} unpacks to more than {MAX_BYTES >> 20} MiB")
            return content
    # zlib and lzma have kinds of their own, a password or an unknown method is a RuntimeError.
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, zlib.error) as error:
        raise UserError(
            f"{path} is not a readable wheel ({error}): delete it and run again"
        ) from None


def read_deb(path: pathlib.Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Streams (name, content) of the files of a Debian package that `wanted(name)` accepts.

    Links and devices are passed over, and nothing is unpacked to disk.

    Raises:
      UserError: it is damaged, or unpacks to more than any package that is wanted.
    """
    process = subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            total = 0
            for member in archive:
                name = member.name.removeprefix("./")
                total += member.size
                if member.size > MAX_BYTES or total > _MAX_TOTAL:
                    raise UserError(f"{path}: unpacks to more than any package that is wanted")
                if member.isfile() and wanted(name):
                    yield name, archive.extractfile(member).read()
        process.stdout.read()
        message = process.stderr.read().decode(errors="replace").strip()
        if process.wait():
            raise tarfile.ReadError(message)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is not a readable Debian package ({error}): delete it and run again"
        ) from None
    finally:  # nobody reads what it writes: that ends it and the process that it unpacks with
        process.stdout.close()
        process.stderr.close()
        process.wait()


def sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, value) -> None:
    """Writes a JSON file that is either the old one or the new one, never half of it."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(scratch, path)


def _run(
    command: list[str],
    what: str,
    scratch: pathlib.Path,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Runs a client in `scratch`, its temporary files too; its last line explains a failure."""
    environment = {**os.environ, "TMPDIR": str(scratch), "LC_ALL": "C"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=scratch, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if progress:
                    progress(_bytes_below(scratch))
        except BaseException:
            process.terminate()
            process.wait()
            raise
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    if process.returncode:
        errors = [line for line in lines if line.startswith(("ERROR", "E:"))] or lines
        raise UserError(f"{what} failed: {errors[-1] if errors else 'no message'}")


def _bytes_below(directory: pathlib.Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # moved in this moment
                pass
    return total


def read_json(path: pathlib.Path):
    """Reads a JSON file; None where there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
