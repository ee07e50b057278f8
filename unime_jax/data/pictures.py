"""Decodes images of any kind to RGB, safely, and stores them small."""

import contextlib
import functools
import importlib.util
import io
import os
import pathlib
import struct
import threading

import numpy as np

from unime_jax.data import image_files
from unime_jax.types import UserError

MAX_PIXELS = 100_000_000
# Pillow knows more: some start programs (EPS runs Ghostscript), the others hold no pictures.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM",
           "QOI", "SGI", "TGA", "TIFF", "WEBP")  # fmt: skip
_EXIF_BYTES = 1 << 20  # more than any file has
# Of 255. Copies of one drawing in two packages differ by up to 3.6, a blue and a green eye by 5.3.
SAME_PICTURE = 4.0
_STORED_SIDE = 256
_ORIENTATION = 0x0112  # EXIF tag
_SIDEWAYS = (5, 6, 7, 8)  # its values that swap width and height
_LOCKS = [threading.Lock() for _ in range(64)]


def size_of(source) -> tuple[int, int]:
    """Reads width and height of an image as `load_rgb` would return it, without decoding it.

    Args:
      source: a PIL image, encoded bytes or a path.

    Raises:
      UserError: not readable, or more than 100 MP.
    """
    with _naming_errors(_name(source)) as name:
        if _is_pil(source):
            image, orientation = source, _check_pil(source, name)
        else:
            with _file(source) as file:
                image, orientation = _open(file, name)
        return image.size[::-1] if orientation in _SIDEWAYS else image.size


def load_rgb(source, *, at_least: int | None = None):
    """Opens a PIL image, encoded bytes or a path as a PIL RGB image; see `open_rgb`."""
    if _is_pil(source):
        with _naming_errors("image") as name:
            return _flatten(_upright(source, _check_pil(source, name)), trim=False)
    return open_rgb(source, _name(source), at_least=at_least)


def open_rgb(content, name: str, *, trim: bool = False, at_least: int | None = None):
    """Decodes an image to a PIL RGB image, upright, transparency on white, of many the first frame.

    The size is read from the header before any pixel is decoded: a file of more than 100 MP is
    refused, however small it is on disk.

    Args:
      content: the encoded file, or its path.
      name: what error messages call it.
      trim: cut off the fully transparent margins.
      at_least: a side in pixels that may be given up: JPEGs are then decoded at the smallest
        scale that keeps both sides at least so large (much faster).
    """
    with _naming_errors(name), _file(content) as file:
        image, orientation = _open(file, name)
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        image.load()
        return _flatten(_upright(image, orientation), trim)


def _is_pil(source) -> bool:
    return hasattr(source, "convert") and hasattr(source, "getexif")


def _name(source) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "image"


def _file(source) -> io.BufferedIOBase:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, image_files.Named):
        source = source.checked()
    if isinstance(source, (str, os.PathLike)):
        return open(pathlib.Path(source).expanduser(), "rb")
    raise UserError(f"an image is given as PIL image, bytes or path, not {type(source).__name__}")


@contextlib.contextmanager
def _naming_errors(name: str):
    """Turns whatever goes wrong with an image into a UserError that begins with its name."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield name
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a readable image (no known format)") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: is more than 100 MP ({error})") from None
    except OSError as error:
        if error.filename is not None:  # the file itself, not what is in it
            kind = image_files.Missing if isinstance(error, FileNotFoundError) else UserError
            raise kind(f"{name}: cannot be read ({error.strerror})") from None
        raise UserError(f"{name}: not a readable image ({error})") from None
    # PIL raises whatever the decoder stumbles over: struct.error, zlib.error, SyntaxError, ...
    except Exception as error:
        raise UserError(f"{name}: not a readable image ({error})") from None


def _open(file, name: str):
    """Reads an image's header; returns the PIL image, not decoded, and its EXIF orientation."""
    from PIL import Image

    image = Image.open(file, formats=_formats())
    _check_pixels(image, name)
    if image.format == "TIFF":
        return image, 1  # Pillow turns these by itself, `size` included
    if image.format == "PNG" and "exif" not in image.info:
        # Behind the pixels Pillow finds it only by decoding them.
        if found := _png_exif(file):
            image.info["exif"] = b"Exif\x00\x00" + found
    return image, Image.Image.getexif(image).get(_ORIENTATION, 1)


@functools.cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # that this Pillow reads


def _png_exif(file) -> bytes | None:
    """Looks for the EXIF chunk of a PNG, hopping from chunk to chunk."""
    before = file.tell()
    file.seek(len(b"\x89PNG\r\n\x1a\n"))
    found = None
    while found is None and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            found = file.read(min(length, _EXIF_BYTES))
        else:
            file.seek(length + 4, os.SEEK_CUR)  # its content and checksum
    file.seek(before)
    return found


def _check_pil(image, name: str) -> int:
    """Decodes a PIL image that was only opened so far; returns its EXIF orientation."""
    _check_pixels(image, name)
    # Rows may share an image, and it is decoded in place. Addresses are multiples of 16.
    with _LOCKS[id(image) // 16 % len(_LOCKS)]:
        image.load()
        return image.getexif().get(_ORIENTATION, 1)


def _check_pixels(image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{name}: {image.width} x {image.height} pixels is more than 100 MP")
    if not image.width * image.height:
        raise UserError(f"{name}: {image.width} x {image.height} pixels is no image")


def _upright(image, orientation: int):
    from PIL import Image

    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _flatten(image, trim: bool):
    """Puts an image of any mode on white."""
    from PIL import Image

    if image.mode.startswith("I;16") and image.mode != "I;16":
        image = image.convert("I")  # another order of bytes
    if image.mode == "F":
        image = _from_floats(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 257).convert("L")  # 16 bits a channel
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if trim and (box := image.getchannel("A").getbbox()):
            image = image.crop(box)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_floats(image):
    """Brings floats, whose range no file tells, to 8 bits: from 1, 255 or 65535, by the largest.

    Raises:
      ValueError: NaN or infinity among them.
    """
    from PIL import Image

    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())  # NaN if there is one
    if not np.isfinite([least, most]).all():
        raise ValueError("NaN or infinite pixels")
    scale = next((255 / top for top in (1, 255) if most <= top), 1 / 257)
    values = values * np.float32(scale)
    return Image.fromarray(np.clip(values, 0, 255, out=values).astype(np.uint8))


def augment(image, rng: np.random.Generator):
    """Draws a horizontal flip and a crop of 70 to 100 % of the area."""
    from PIL import ImageOps

    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    share = rng.uniform(0.7, 1.0) ** 0.5
    width, height = (max(1, round(side * share)) for side in image.size)
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def resize(image, side: int):
    """Resizes an image to a square, aspect ignored."""
    from PIL import Image

    return image.resize((side, side), Image.Resampling.BICUBIC)


def square(image, size: int) -> np.ndarray:
    """Fits an image into a white square, aspect kept; uint8[size, size, 3]."""
    from PIL import Image, ImageOps

    image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="white")
    return np.asarray(image)


def shrink(image) -> bytes:
    """Encodes a PIL image as a JPEG of at most 256 px on the long side."""
    from PIL import Image

    image.thumbnail((_STORED_SIDE, _STORED_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # 4:4:4 and 95: drawings have hard coloured edges, and a file is 10 KB all the same.
    image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def check_svg() -> None:
    """Raises UserError if SVG files cannot be rendered here."""
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError("rendering SVG needs the `smol` extra: pip install resvg-py")


def fingerprint(image) -> np.ndarray:
    """Returns int16[192], the colours of a PIL RGB image on an 8 x 8 grid.

    The mean difference of two copies of one picture, stored or drawn in different ways, is below
    `SAME_PICTURE`.
    """
    from PIL import Image

    return np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.int16).reshape(-1)


def render_svg(content: bytes, name: str) -> bytes:
    """Renders an SVG to a PNG of about the stored size."""
    import resvg_py

    try:
        text = content.decode("utf-8")
        # dpi: drawings measured in points have no size without it.
        png = resvg_py.svg_to_bytes(
            svg_string=text, width=2 * _STORED_SIDE, dpi=96.0, skip_system_fonts=True
        )
        return bytes(png)
    except ValueError as error:
        raise UserError(f"{name}: not a readable SVG ({error})") from None


class EmojiFont:
    """Renders emoji with a colour bitmap font (Noto's glyphs are 136 x 128 at size 109)."""

    SIZE = 109

    def __init__(self, content: bytes):
        from PIL import ImageFont, features

        # Sequences (flags, professions) are joined into one glyph by the Raqm layout engine.
        self._joins = features.check("raqm")
        try:
            self._font = ImageFont.truetype(io.BytesIO(content), self.SIZE)
        except OSError as error:
            raise UserError(f"the emoji font cannot be read: {error}") from None
        self._width = self._font.getlength("\N{GRINNING FACE}")

    def render(self, emoji: str):
        """Draws one emoji on white; None where the font has no single glyph for it."""
        from PIL import Image, ImageDraw

        visible = emoji.replace("\ufe0f", "")
        if len(visible) > 1 and not self._joins:
            return None
        if self._font.getlength(emoji) != self._width:
            return None
        image = Image.new("RGBA", (136, 136), (255, 255, 255, 0))
        drawing = ImageDraw.Draw(image)
        drawing.text((0, 4), emoji, font=self._font, embedded_color=True, anchor="la")
        box = image.getchannel("A").getbbox()
        if box is None or (box[2] - box[0]) * (box[3] - box[1]) < 300:
            return None
        return _flatten(image, trim=True)
