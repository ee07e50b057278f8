"""What reads files that others wrote, each called as the package calls it."""

import io
import pathlib

import model_readers
import numpy as np
import packages
import row_readers
from PIL import Image
from reader import Reader

from unime_jax.data import assets, pictures


def _pictures(kind: str, mode: str = "RGB", **options) -> Reader:
    def write(directory: pathlib.Path) -> None:
        rng = np.random.default_rng(0)
        image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).convert(mode)
        file = io.BytesIO()
        image.save(file, kind, **options)
        (directory / "x.png").write_bytes(file.getvalue())

    def read(directory: pathlib.Path):
        pictures.size_of(directory / "x.png")
        pictures.load_rgb((directory / "x.png").read_bytes(), at_least=4)

    return Reader(write, ("x.png",), read)


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def _write_packages(directory: pathlib.Path) -> None:
    packages.wheel(directory / "x.whl", {"a/x.txt": b"hello " * 50, "b/y": b"y"})


def _read_packages(directory: pathlib.Path):
    assets.read_wheel(directory / "x.whl", "x.txt")


def _write_deb(directory: pathlib.Path) -> None:
    packages.deb(directory / "x.deb", "x", {"usr/a.png": packages.png(), "usr/b.txt": b"b"})


def _read_deb(directory: pathlib.Path):
    list(assets.read_deb(directory / "x.deb", lambda name: True))


READERS: dict[str, Reader] = {
    **model_readers.READERS,
    **row_readers.READERS,
    "JPEG": _pictures("JPEG", exif=_exif()),
    "PNG": _pictures("PNG", "RGBA", exif=_exif()),
    "GIF": _pictures("GIF", "P"),
    "TIFF": _pictures("TIFF", compression="tiff_lzw"),
    "TIFF, floats": _pictures("TIFF", "F"),
    "WebP": _pictures("WEBP"),
    "BMP": _pictures("BMP"),
    "wheel": Reader(_write_packages, ("x.whl",), _read_packages),
    "deb": Reader(_write_deb, ("x.deb",), _read_deb),
}
