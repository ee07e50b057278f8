"""Cuts images into the tiles that a vision tower takes, and says where their features go.

One transform for each `ImageSpec.kind`. What an image takes of its row is a function of its size
alone, so that rows are sorted by length before any pixel is decoded.
"""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Int32, UInt8

from unime_jax.data import pictures
from unime_jax.types import ImageSpec, UserError

# Numbers of tiles that groups of Phi's rows are padded to: few shapes, at most a third of zeros.
_PHI_TILES = (1, 2, 4, 6, 9, 12, 16)
# Rows of the visual sequence (types.ImageSpec).
_SUB, _GLOBAL, _PHI_FIRST = 0, 1, 2
_NEWLINE, _LLAVA_FIRST = 0, 1

Tiles = UInt8[np.ndarray, "C S S 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What an image takes of its row.

    Attributes:
      tiles: how many.
      grid: rows and columns of the tiles, without the thumbnail or the whole image.
      index: for each position of the image in its row, the place in the visual sequence that it
        takes (`types.ImageSpec`).
    """

    tiles: int
    grid: tuple[int, int]
    index: Int32[np.ndarray, "positions"]

    @property
    def positions(self) -> int:
        return len(self.index)


class Square:
    """Kind "grid": the image fitted into one white square, aspect kept."""

    def __init__(self, spec: ImageSpec):
        self._size = spec.size
        self._layout = Layout(1, (1, 1), np.arange(spec.features, dtype=np.int32))

    def layout(self, width: int, height: int) -> Layout:
        return self._layout

    def cut(self, image) -> Tiles:
        return pictures.square(image, self._size)[None]

    def bucket(self, tiles: int) -> int:
        return tiles


class PhiHD:
    """Kind "phi_hd": Phi-3.5-vision's HD transform; the thumbnail is made on the device.

    Args:
      spec: of the model.
      crops: most tiles of an image.
    """

    def __init__(self, spec: ImageSpec, crops: int):
        self._size, self._features, self._crops = spec.size, spec.features, crops

    def _fit(self, width: int, height: int) -> tuple[int, int]:
        """Returns the size, the long side first, that an image is resized to.

        Raises:
          UserError: the image is so thin that nothing would be left of its height.
        """
        long, short = max(width, height), min(width, height)
        ratio = long / short
        scale = 1
        while (scale + 1) * math.ceil((scale + 1) / ratio) <= self._crops:
            scale += 1
        new_width = scale * self._size
        new_height = int(new_width / ratio)
        if new_height == 0:
            raise UserError(
                f"{width} x {height} pixels: too thin, its short side would be resized from "
                f"{short} to 0; cut or pad the image"
            )
        return new_width, new_height

    def layout(self, width: int, height: int) -> Layout:
        new_width, new_height = self._fit(width, height)
        grid = -(-new_height // self._size), new_width // self._size
        return _phi_layout(*(grid if width >= height else grid[::-1]), self._features)

    def cut(self, image) -> Tiles:
        from PIL import Image

        # The published code turns a portrait before it resizes: PIL's horizontal pass comes first
        # and rounds, so the order shows in the pixels.
        portrait = image.width < image.height
        if portrait:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        width, height = self._fit(*image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        canvas = np.full((-(-height // self._size) * self._size, width, 3), 255, np.uint8)
        top = (len(canvas) - height) // 2
        canvas[top : top + height] = np.asarray(image)
        return _cut(canvas.transpose(1, 0, 2) if portrait else canvas, self._size)

    def bucket(self, tiles: int) -> int:
        return next((size for size in _PHI_TILES if size >= tiles), tiles)


class AnyResolution:
    """Kind "llava_anyres": LLaVA-1.6's whole image and tiles of the canvas that suits it best."""

    def __init__(self, spec: ImageSpec):
        self._spec = spec

    def _canvas(self, width: int, height: int) -> tuple[int, int]:
        """Returns (height, width) of the canvas that keeps most of the image, then wastes least."""

        def worth(canvas: tuple[int, int]) -> tuple[int, int]:
            scale = min(canvas[1] / width, canvas[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - canvas[0] * canvas[1]

        return max(self._spec.grids, key=worth)  # the first of equals

    def layout(self, width: int, height: int) -> Layout:
        size = self._spec.size
        canvas = self._canvas(width, height)
        side = math.isqrt(self._spec.features)
        grid = canvas[0] // size, canvas[1] // size
        rows, columns = grid[0] * side, grid[1] * side
        # Features of the black margins are left out, as many on either side.
        if width / height > columns / rows:
            margin = (rows - int(round(height * (columns / width), 7))) // 2, 0
        else:
            margin = 0, (columns - int(round(width * (rows / height), 7))) // 2
        return _anyres_layout(grid, margin, self._spec.features)

    def cut(self, image) -> Tiles:
        from PIL import Image

        size = self._spec.size
        width, height = image.size
        canvas_height, canvas_width = self._canvas(width, height)
        scale_x, scale_y = canvas_width / width, canvas_height / height
        if scale_x < scale_y:
            fitted = canvas_width, min(math.ceil(height * scale_x), canvas_height)
        else:
            fitted = min(math.ceil(width * scale_y), canvas_width), canvas_height
        canvas = np.zeros((canvas_height, canvas_width, 3), np.uint8)
        left, top = (canvas_width - fitted[0]) // 2, (canvas_height - fitted[1]) // 2
        canvas[top : top + fitted[1], left : left + fitted[0]] = np.asarray(
            image.resize(fitted, Image.Resampling.BICUBIC)
        )
        whole = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        return np.concatenate([whole[None], _cut(canvas, size)])

    def bucket(self, tiles: int) -> int:
        return tiles  # as many as there are kinds of canvas: three in the published model


Transform = Square | PhiHD | AnyResolution


@functools.lru_cache(maxsize=256)
def _phi_layout(rows: int, columns: int, features: int) -> Layout:
    side = math.isqrt(features)
    thumbnail = _PHI_FIRST + np.arange(features, dtype=np.int32).reshape(side, side)
    # A 1 x 1 grid is its own thumbnail (slot 0); else tile t is slot t + 1.
    slots = np.arange(rows * columns) + (rows * columns > 1)
    crops = _side_by_side(thumbnail + features * slots[:, None, None], rows, columns)
    index = np.concatenate(
        [_closed(crops, _SUB), np.array([_GLOBAL], np.int32), _closed(thumbnail, _SUB)]
    )
    return Layout(rows * columns, (rows, columns), index)


@functools.lru_cache(maxsize=4096)
def _anyres_layout(grid: tuple[int, int], margin: tuple[int, int], features: int) -> Layout:
    side = math.isqrt(features)
    base = _LLAVA_FIRST + np.arange(features, dtype=np.int32)
    slots = 1 + np.arange(grid[0] * grid[1])
    cells = _side_by_side(
        base.reshape(side, side) + features * slots[:, None, None], grid[0], grid[1]
    )
    cells = cells[margin[0] : len(cells) - margin[0], margin[1] : cells.shape[1] - margin[1]]
    return Layout(1 + len(slots), grid, np.concatenate([base, _closed(cells, _NEWLINE)]))


def _side_by_side(cells: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Lays tiles [C, side, side] out in a grid [rows * side, columns * side]."""
    side = cells.shape[-1]
    laid = cells.reshape(rows, columns, side, side).transpose(0, 2, 1, 3)
    return laid.reshape(rows * side, columns * side).astype(np.int32)


def _closed(cells: np.ndarray, end: int) -> np.ndarray:
    """Reads a grid line by line, with a separator at each line's end."""
    return np.pad(cells, [(0, 0), (0, 1)], constant_values=end).reshape(-1)


def _cut(canvas: np.ndarray, size: int) -> Tiles:
    """Cuts uint8[h * S, w * S, 3] into tiles, row by row."""
    rows, columns = canvas.shape[0] // size, canvas.shape[1] // size
    tiles = canvas.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, size, size, 3))
