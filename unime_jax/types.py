"""The few types that cross module borders, and the axis letters used everywhere.

Axis letters, in annotations, einsums and docs alike:

B batch, T tokens, D width, E embedding, N query heads, K key/value heads, H head width,
F feed-forward width, V vocabulary, L layers, R adapter rank, C tiles, P visual features of
one tile, S side of a tile in pixels, G rows of one group.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

Array = jax.Array
# A nested dict of arrays: the parameters of a model, keyed by attribute names.
Params = dict[str, Any]


class UserError(Exception):
    """A fault in the user's input: one line that names the file, key or row and what to do.

    Entries print it without a traceback and exit with code 2.
    """


def reason(error: BaseException) -> str:
    """Returns the first line of what an error says, its kind where it says nothing."""
    lines = (line for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)[:200]


def _pytree(cls):
    """Makes a frozen dataclass a pytree whose fields are all children."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@_pytree
class Inputs:
    """One group: rows that share a shape. Numpy on the host, jax arrays on the device.

    Attributes:
      tokens: int32[G, T], right-padded with 0; positions of image features hold 0 as well.
      lengths: int32[G], real positions of each row, at least 1.
      image_index: int32[G, T], the row of the visual sequence (its layout: `ImageSpec.kind`) that
        stands at this position, -1 for text.
      tiles: uint8[G, C, S, S, 3], RGB; C = 0 for text rows, which never run the vision tower. Rows
        with fewer tiles than C hold zeros behind them.
      features: f32 or f16[G, C, P, D_vision] or None: output of a frozen vision tower; where
        given, the tower is not run and `tiles` has S = 0. For "phi_hd" an entry per slot instead
        of per tile.
      index: int32[G] or None: the place of each row among the rows of all groups; None means that
        groups stand in order.
      grid: int32[G, 2], rows and columns that the image's tiles are laid out in; only for backbones
        that need it ("phi_hd"), else None.
      skip: int32[G] or None: positions at the front of each row that a mean over tokens leaves out
        (the instruction of NV-Embed); backbones that read the last token ignore it.
    """

    tokens: Any
    lengths: Any
    image_index: Any
    tiles: Any
    features: Any = None
    index: Any = None
    grid: Any = None
    skip: Any = None

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]


@_pytree
class Batch:
    """What one training step consumes.

    Attributes:
      query: groups; concatenated and then permuted by `query_order` they are rows 0..B-1. None: a
        group of which this process has no row (`data.shares`).
      target: groups, likewise; () where `vectors` stand for the other side.
      query_order, target_order: int32[B]; row i of the batch is row order[i] of the side's groups,
        or of the query's for a side without any (`chunks.merge`). None: there is no such side.
      vectors: f32[N, E] or None: embeddings of the teacher for the rows of query, target and
        negative, one side after the other (stage 1), or cached ones of the targets (alignment).
      target_ids: int32[B] or None; equal ids mean the same target.
      negative: groups, k hard negatives of each row, one row's after the other's; () without.
      negative_order, negative_ids: as those of the target, int32[B k].
      scores: f32[B, 1 + k] or None: a judge's scores of the target and of the row's negatives,
        -inf for a place that is left empty.
      sets: int32[B] or None: the data set of each row, by number.
    """

    query: tuple[Inputs | None, ...]
    target: tuple[Inputs | None, ...]
    query_order: Any
    target_order: Any
    vectors: Any = None
    target_ids: Any = None
    negative: tuple[Inputs | None, ...] = ()
    negative_order: Any = None
    negative_ids: Any = None
    scores: Any = None
    sets: Any = None


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What the host must know of a backbone to prepare its images.

    The visual sequence of a row is what `Inputs.image_index` counts in. Its layout by kind:

    - "grid": the P features of the row's one tile.
    - "phi_hd": separators `sub_GN` (0) and `glb_GN` (1); from 2 on, slots of P features. Slot 0 is
      the thumbnail, slot 1 + t is tile t, tiles in rows from the top left. A 1 x 1 grid is its own
      thumbnail: such a row uses slot 0 alone, and a group with C = 1 has no other slot.
    - "llava_anyres": `image_newline` (0); tile t has the P features from 1 + t P on. Tile 0 is the
      whole image, then the tiles of the grid in rows from the top left.

    Attributes:
      kind: which host-side transform and which layout apply.
      size: S, the side of a tile in pixels.
      features: P, visual features of one tile.
      crops: phi_hd: most tiles that an image is cut into, unless the checkpoint's
        preprocessor_config.json says otherwise.
      grids: llava_anyres: (height, width) in pixels of every canvas, in the checkpoint's order.
    """

    kind: str
    size: int
    features: int
    crops: int = 1
    grids: tuple[tuple[int, int], ...] = ()


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """Returns `{"a/b/c": leaf}` of a nested dict; leaves that are None are left out."""
    flat = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverts `flatten`."""
    params: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params
