"""Images as the published processors cut them, written plainly; and rows that hold them.

Layouts are those of `ImageSpec`. The package's own host code is not used here.
"""

import pathlib

import numpy as np
from flax import nnx
from PIL import Image

from unime_jax import models
from unime_jax.models import hf
from unime_jax.types import Inputs, flatten

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def hd_transform(image: np.ndarray, crops: int, size: int = 336) -> tuple[np.ndarray, tuple]:
    """Phi's tiles uint8[h * w, S, S, 3] and (h, w)."""
    picture = Image.fromarray(image)
    portrait = picture.width < picture.height
    if portrait:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    ratio = picture.width / picture.height
    scale = 1
    while scale * np.ceil(scale / ratio) <= crops:
        scale += 1
    scale -= 1
    width = scale * size
    height = int(width / ratio)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    padded = np.full((-(-height // size) * size, width, 3), 255, np.uint8)
    top = (len(padded) - height) // 2
    padded[top : top + height] = np.asarray(picture)
    return cut(padded.transpose(1, 0, 2) if portrait else padded, size)


def cut(image: np.ndarray, size: int) -> tuple[np.ndarray, tuple]:
    """Tiles in rows from the top left, and (rows, columns)."""
    h, w = image.shape[0] // size, image.shape[1] // size
    tiles = image.reshape(h, size, w, size, 3).swapaxes(1, 2)
    return tiles.reshape(h * w, size, size, 3), (h, w)


def phi_index(grid: tuple[int, int], side: int = 12) -> list[int]:
    """Positions of an image of h x w tiles, with `side` merged patches along a tile."""
    h, w = grid
    features = side * side

    def line(tiles, row):
        starts = [2 + tile * features + row * side for tile in tiles]
        return [start + column for start in starts for column in range(side)] + [0]

    out = []
    for tile_row in range(h):
        tiles = [0] if h * w == 1 else [1 + tile_row * w + column for column in range(w)]
        for row in range(side):
            out += line(tiles, row)
    out.append(1)
    for row in range(side):
        out += line([0], row)
    return out


def pack(rows, *, size: int, tiles: int | None = None, tokens: int | None = None) -> Inputs:
    """One group of (token ids, image index per position, tiles or None, grid or None)."""
    count = max(0 if row[2] is None else len(row[2]) for row in rows) if tiles is None else tiles
    length = max(len(row[0]) for row in rows) if tokens is None else tokens
    ids = np.zeros((len(rows), length), np.int32)
    index = np.full((len(rows), length), -1, np.int32)
    packed = np.zeros((len(rows), count, size, size, 3), np.uint8)
    grids = np.ones((len(rows), 2), np.int32)
    for i, (row_ids, row_index, row_tiles, grid) in enumerate(rows):
        ids[i, : len(row_ids)] = row_ids
        index[i, : len(row_index)] = row_index
        if row_tiles is not None:
            packed[i, : len(row_tiles)] = row_tiles
            grids[i] = grid
    lengths = np.array([len(row[0]) for row in rows], np.int32)
    return Inputs(ids, lengths, index, packed, grid=grids)


def assert_keys_are(config: dict, expected: dict[str, list[int]]) -> None:
    """Checks that a model of true size maps every key of its files, with its shape, both ways."""
    model = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
    abstract = flatten(nnx.to_pure_dict(nnx.state(model)))
    source = _Shapes(expected)
    key_map = models.rules(config)
    hf.check(source, key_map, abstract)
    written = {}
    for rule in key_map.rules:
        keys = hf.keys_of(rule, abstract[rule.ours].shape)
        written.update(dict.fromkeys(keys, rule))
    copies = {copy: original for copy, original in key_map.copies if copy in expected}
    assert set(written) | set(copies) == set(expected)
    for copy in copies:
        without = {key: shape for key, shape in expected.items() if key != copy}
        hf.check(_Shapes(without), key_map, abstract)


class _Shapes:
    """A source whose tensors have shapes and no content."""

    name = "shapes"

    def __init__(self, shapes):
        self._shapes = shapes

    def keys(self):
        return set(self._shapes)

    def slice(self, key):
        return _Shape(self._shapes[key])


class _Shape:
    def __init__(self, shape):
        self._shape = shape

    def get_shape(self):
        return self._shape

    def get_dtype(self):
        return "BF16"

    def __getitem__(self, index):
        return np.zeros(1)
