"""Decodes images of any kind to RGB, safely, and stores them small."""

import importlib.util
import io
import os
import pathlib
import warnings

import numpy as np

from unime_jax.types import UserError

MAX_PIXELS = 100_000_000
# Of 255. Copies of one drawing in two packages differ by up to 3.6, a blue and a green eye by 5.3.
SAME_PICTURE = 4.0
_STORED_SIDE = 256


def open_rgb(content: bytes, name: str, *, trim: bool = False, at_least: int | None = None):
    """Decodes an image to a PIL RGB image, upright, transparency on white.

    The size is read from the header before any pixel is decoded: a file of more than 100 MP is
    refused, however small it is on disk.

    Args:
      content: the encoded file.
      name: what error messages call it.
      trim: cut off the fully transparent margins.
      at_least: a side in pixels that may be given up: JPEGs are then decoded at the smallest
        scale that keeps both sides at least so large (much faster).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # We check the size ourselves; PIL's warning would come first.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{name}: {image.width} x {image.height} pixels is more than 100 MP")
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        image.load()
        image = ImageOps.exif_transpose(image)
        return _flatten(image, trim)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a readable image (no known format)") from None
    # PIL raises whatever the decoder stumbles over: struct.error, zlib.error, SyntaxError, ...
    except Exception as error:
        raise UserError(f"{name}: not a readable image ({error})") from None


def _flatten(image, trim: bool):
    """Puts an image of any mode on white."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 257).convert("L")  # 16 bits a channel
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if trim and (box := image.getchannel("A").getbbox()):
            image = image.crop(box)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def load_rgb(source, *, at_least: int | None = None):
    """Opens a PIL image, encoded bytes or a path as a PIL RGB image; see `open_rgb`."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return open_rgb(bytes(source), "image", at_least=at_least)
    if isinstance(source, (str, os.PathLike)):
        try:
            content = pathlib.Path(source).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror})") from None
        return open_rgb(content, str(source), at_least=at_least)
    if not hasattr(source, "convert"):
        raise UserError(
            f"an image is given as PIL image, bytes or path, not {type(source).__name__}"
        )
    return _flatten(source, trim=False)


def square(image, size: int, augment: np.random.Generator | None = None) -> np.ndarray:
    """Fits an image into a white square, aspect kept; uint8[size, size, 3]."""
    from PIL import Image, ImageOps

    if augment is not None:
        if augment.random() < 0.5:
            image = ImageOps.mirror(image)
        share = augment.uniform(0.7, 1.0) ** 0.5
        width, height = (max(1, round(side * share)) for side in image.size)
        left = int(augment.integers(0, image.width - width + 1))
        top = int(augment.integers(0, image.height - height + 1))
        image = image.crop((left, top, left + width, top + height))
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
