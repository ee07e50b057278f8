"""Fetches packages once, checks them, and reads files out of them where they lie."""

import collections.abc
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from unime_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Package:
    """One package of a public registry.

    Attributes:
      name: its name in the registry.
      registry: "pypi" or "debian".
      version: exact for PyPI; the version `sha256` was taken from for Debian, where the
        distribution decides.
      sha256: of the file of that version.
      licence: of its content, for the report.
    """

    name: str
    registry: str
    version: str
    sha256: str
    licence: str


class Cache:
    """Keeps fetched packages in one folder with a record of what was checked.

    A package is downloaded to a scratch folder and moved into place after its checksum was
    taken, so that an interrupted fetch leaves nothing half-done and nothing is fetched twice.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)
        self._record_path = self.directory / "checksums.json"
        self._updated = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the cache {self.directory}: {error.strerror}") from None

    def path(self, package: Package) -> pathlib.Path | None:
        """Finds the package's file if it was fetched before and is still what it was."""
        entry = self._record().get(package.name)
        path = self.directory / entry["file"] if entry else None
        if path is None or not path.exists():
            return None
        if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
            raise UserError(
                f"{path} does not match its checksum (damaged?): delete it and run again"
            )
        return path

    def fetch(self, package: Package) -> pathlib.Path:
        """Downloads the package unless it is here; raises UserError if that fails."""
        path = self.path(package)
        if path is not None:
            return path
        # A file put here by hand, or moved into place before a crash, is as good.
        for path in self.directory.glob(f"{package.name.replace('-', '[-_]')}[-_]*"):
            if path.suffix in (".whl", ".deb") and sha256(path) == package.sha256:
                return self._keep(package, path)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=".fetch-", dir=self.directory))
        try:
            if package.registry == "pypi":
                self._pip(package, scratch)
            else:
                self._apt(package, scratch)
            files = [path for path in scratch.iterdir() if path.suffix in (".whl", ".deb")]
            if len(files) != 1:
                raise UserError(f"fetching {package.name} left {len(files)} files instead of one")
            target = self.directory / files[0].name
            os.replace(files[0], target)
        except OSError as error:
            raise UserError(
                f"cannot store {package.name} in {self.directory}: {error.strerror}"
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return self._keep(package, target)

    def _keep(self, package: Package, path: pathlib.Path) -> pathlib.Path:
        digest = sha256(path)
        # apt has checked a .deb against the distribution's signed lists; another
        # distribution ships another version, so only a PyPI file must match exactly.
        same_version = package.registry == "pypi" or f"_{package.version}_" in path.name.replace(
            "%3a", ":"
        )
        if same_version and digest != package.sha256:
            path.unlink()
            raise UserError(
                f"{path.name} has sha256 {digest[:12]}..., expected {package.sha256[:12]}...: "
                "removed it; run again, and check the package index if it happens twice"
            )
        record = self._record()
        record[package.name] = {"file": path.name, "size": path.stat().st_size, "sha256": digest}
        write_json(self._record_path, record)
        return path

    def _record(self) -> dict:
        try:
            return json.loads(self._record_path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def _pip(self, package: Package, scratch: pathlib.Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch)]
        _run(command + [f"{package.name}=={package.version}"], f"pip download {package.name}")

    def _apt(self, package: Package, scratch: pathlib.Path) -> None:
        if not apt_available():
            raise UserError(
                f"{package.name} is a Debian package and there is no apt-get here: "
                "give image-caption pairs of your own with --pairs pairs.jsonl"
            )
        options, download = [], ["download", package.name]
        known = subprocess.run(["apt-cache", "show", package.name], capture_output=True)
        if known.returncode or not known.stdout.strip():
            options = self._private_lists()
        if os.geteuid() == 0:  # apt's own user may not enter the cache directory
            options += ["-o", "APT::Sandbox::User=root"]
        _run(["apt-get", "-qq", *options, *download], f"apt-get download {package.name}", scratch)

    def _private_lists(self) -> list[str]:
        """Fetches the package lists into the cache, once, and points apt at them.

        The machine's own lists are left alone: no root is needed, nothing is changed.
        """
        state = self.directory / "apt"
        for folder in ("lists/partial", "cache/archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        options = ["-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
        if os.geteuid() == 0:
            options += ["-o", "APT::Sandbox::User=root"]
        if not self._updated:
            _run(["apt-get", "-qq", *options, "update"], "apt-get update")
            self._updated = True
        return options


def apt_available() -> bool:
    return all(map(shutil.which, ("apt-get", "apt-cache", "dpkg-deb")))


def read_wheel(path: pathlib.Path, suffix: str) -> bytes:
    """Reads the one file of a wheel whose name ends in `suffix`."""
    try:
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(suffix)]
            if len(names) != 1:
                raise UserError(f"{path} holds {len(names)} files named *{suffix}, expected one")
            return wheel.read(names[0])
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(
            f"{path} is not a readable wheel ({error}): delete it and run again"
        ) from None


def read_deb(
    path: pathlib.Path, wanted: collections.abc.Callable[[str], bool]
) -> collections.abc.Iterator[tuple[str, bytes]]:
    """Streams (name, content) of the files of a Debian package that `wanted(name)` accepts."""
    process = subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and wanted(name):
                    yield name, archive.extractfile(member).read()
        process.stdout.read()
        message = process.stderr.read().decode(errors="replace").strip()
        if process.wait():
            raise tarfile.ReadError(message)
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is not a readable Debian package ({error}): delete it and run again"
        ) from None
    finally:
        process.kill()
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


def _run(command: list[str], what: str, cwd: pathlib.Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UserError(f"{what} failed: {lines[-1].strip() if lines else 'no message'}")


def read_json(path: pathlib.Path):
    """Reads a JSON file; None where there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def table(header: tuple, rows: list[tuple]) -> str:
    """Lays rows out in aligned columns, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        line = (
            cell.rjust(width) if cell.isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        lines.append("  ".join(line).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"
