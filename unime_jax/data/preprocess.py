"""Turns texts and images into rows of fixed shape, on the host."""

import contextlib
import functools
import hashlib
import operator
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unime_jax.data import buckets, pictures, processor_files, prompts, tokenizer
from unime_jax.data.rows import IMAGE_SLOT, Picture, Row
from unime_jax.data.tiles import Layout, Square, Transform
from unime_jax.types import ImageSpec, Inputs, UserError

_LETTERS = 16  # of a token, at least; a text with longer ones is tokenised as a whole
_SPARE = 512  # letters or tokens, where a text may be tokenised otherwise for it was cut


class Preprocessor:
    """Tokenizer, prompt and image transform of one backbone.

    Args:
      directory: of the checkpoint: tokenizer.json (read at the first text),
        preprocessor_config.json.
      image_spec: how images are prepared; None for a model that takes none.
      prompt: key of `prompts.TEMPLATES`.
      max_tokens: longest row, image positions included.
      image_token_id: marks the image's place in rows given to `embed_rows`; where it is not
        negative it is also the token that stands for the image in the tokenizer.
      vocabulary: number of token ids of the model, to check rows given to `embed_rows`.
      image_size: side of a square that every image is resized to first, aspect ignored, so that all
        take the same tiles and positions; 0: as they are.
      image_crops: most tiles of an image where the model has such a number; 0: the checkpoint's.
      limits: of groups.
      window: most positions that the model attends to; longer rows are refused. None: all.

    Attributes:
      programs: that the groups made so far are read by.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        image_spec: ImageSpec | None,
        *,
        prompt: str,
        max_tokens: int,
        image_token_id: int = IMAGE_SLOT,
        vocabulary: int | None = None,
        image_size: int = 0,
        image_crops: int = 0,
        limits: buckets.Limits = buckets.LIMITS,
        window: int | None = None,
    ):
        self.image_spec = image_spec
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.image_token_id = image_token_id
        self._vocabulary = vocabulary
        self.image_size = image_size
        self._image_crops = image_crops
        self.limits = limits
        self.programs = buckets.Programs(limits.program)
        self._window = window
        self._directory = directory
        self._transform = None
        if image_spec is not None:
            self._transform = processor_files.make_transform(
                image_spec, directory, crops=image_crops
            )

    @functools.cached_property
    def _tokenizer(self) -> tokenizer.Tokenizer:
        return tokenizer.Tokenizer(
            self._directory,
            image_token=self.image_token_id if self.image_token_id >= 0 else None,
            apart=self.image_spec is not None and self.image_spec.kind == "phi_hd",
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Is equal where rows of text take equal numbers of tokens and images equal positions."""
        settings = self.prompt, self.max_tokens, self.image_spec, self.image_size, self._image_crops
        digest = hashlib.sha256(repr(settings).encode())
        directory = pathlib.Path(self._directory).expanduser()
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            path = directory / name
            digest.update(path.read_bytes() if path.is_file() else b"")
        return digest.hexdigest()

    # ---- images

    @property
    def transform(self) -> Transform:
        """Cuts images.

        Raises:
          UserError: the model takes none.
        """
        if self._transform is None:
            raise UserError("this model reads texts alone, no images")
        return self._transform

    def layout(self, width: int, height: int) -> Layout:
        """Returns what an image of a size takes of its row."""
        if self.image_size:
            width = height = self.image_size
        return self.transform.layout(width, height)

    @property
    def fixed_layout(self) -> Layout:
        """Is what every image takes, whatever its size.

        Raises:
          UserError: it depends on the size.
        """
        if not self._is_fixed():
            raise UserError(
                "images of this model take more or less of a row according to their size; set "
                "config.data.image_size (the paper's is 336)"
            )
        return self.layout(1, 1)

    def _is_fixed(self) -> bool:
        return self.image_size > 0 or isinstance(self.transform, Square)

    def image(self, source: Any, *, augment: np.random.Generator | None = None) -> Picture:
        """Prepares an image: a PIL image, encoded bytes or a path.

        Args:
          source: the image; transparency becomes white, EXIF rotation is applied.
          augment: draws a horizontal flip and a crop of 70 to 100 % of the area, if given.

        Raises:
          UserError: not readable, more than 100 MP, or of a shape the model cannot take.
        """
        transform = self.transform
        # Decoded at full scale: a JPEG decoded at a smaller one is another image than the same file
        # opened with PIL, by up to 3e-4 in cosine.
        image = pictures.load_rgb(source)
        if augment is not None:
            image = pictures.augment(image, augment)
        if self.image_size:
            image = pictures.resize(image, self.image_size)
        return Picture(transform.cut(image), transform.layout(*image.size))

    # ---- rows

    def tokenize(
        self,
        text: str | prompts.Slotted | None,
        has_image: bool,
        instruction: str | None = None,
        *,
        layout: Layout | None = None,
        most: int | None = None,
    ) -> Row:
        """Tokenises a row's prompt; what looks like a special token in the text stays text.

        Args:
          text: the user's.
          has_image: whether the row has an image.
          instruction: put before the text.
          layout: of the image; without it only rows whose image takes a fixed number of positions
            are cut to `max_tokens`.
          most: tokens of the text that will be left, if fewer than `max_tokens`: of a long text
            no more is tokenised.
        """
        if has_image and layout is None and self._is_fixed():
            layout = self.fixed_layout
        segments = prompts.render(self.prompt, text, has_image, instruction)
        most = self.max_tokens if most is None else min(most, self.max_tokens)
        ids, start, stop = self._encode(segments, most)
        # Counted apart from the text, as the published code of NV-Embed counts it.
        skipped = prompts.skipped(self.prompt, instruction)
        skip = self._tokenizer.count(skipped) if skipped else 0
        positions = 1 if layout is None else layout.positions
        return Row(tuple(ids), start, stop, skip=skip).cut(self.max_tokens, positions)

    def _encode(self, segments: list[prompts.Segment], most: int) -> tuple[list[int], int, int]:
        """Encodes a prompt, but of the middle of a long text nothing that is cut anyway."""
        places = [i for i, segment in enumerate(segments) if segment.role == "text"]
        letters = _LETTERS * most + _SPARE
        if places and len(text := segments[places[-1]].value) > letters:
            short = list(segments)
            # The end stays: what follows the text may form a token with it.
            short[places[-1]] = prompts.Segment("text", text[: letters - _SPARE] + text[-_SPARE:])
            found = self._tokenizer.encode(short, IMAGE_SLOT)
            if found[2] - found[1] > most + 2 * _SPARE:  # what was left out is cut whatever it is
                return found
        return self._tokenizer.encode(segments, IMAGE_SLOT)

    def text_of(self, token: int) -> str:
        """Returns what a token id stands for in a text; see `tokenizer.Tokenizer.text_of`."""
        return self._tokenizer.text_of(token)

    def group(
        self, rows: Sequence[tuple[Row, Picture | None]], *, tokens: int, tiles: int
    ) -> Inputs:
        """Packs rows into one group.

        Args:
          rows: tokenised rows, each with its image or None.
          tokens: T; longer texts are cut, prompt and image never.
          tiles: C; rows with fewer get zeros behind them. 0 for text.

        Raises:
          UserError: a row that does not fit into T without its text, or has more than C tiles.
        """
        out_tokens = np.zeros((len(rows), tokens), np.int32)
        out_index = np.full((len(rows), tokens), -1, np.int32)
        lengths = np.zeros(len(rows), np.int32)
        for i, (row, image) in enumerate(rows):
            if row.has_image != (tiles > 0) or (image is None) != (tiles == 0):
                raise UserError(f"row {i}: rows with and without image do not mix in one group")
            if image is not None and len(image.tiles) > tiles:
                raise UserError(f"row {i}: {len(image.tiles)} tiles in a group of {tiles}")
            positions = 0 if image is None else image.layout.positions
            row = row.cut(tokens, positions)
            lengths[i] = row.length(positions)
            if image is None:
                out_tokens[i, : lengths[i]] = row.ids
                continue
            at = row.ids.index(IMAGE_SLOT)
            out_tokens[i, :at] = row.ids[:at]
            out_tokens[i, at + positions : lengths[i]] = row.ids[at + 1 :]
            out_index[i, at : at + positions] = image.layout.index
        images = [image for _, image in rows]
        packed, features = self._pack_images(images, tiles)
        grid = None
        if tiles and self.image_spec.kind == "phi_hd":
            grid = np.array([image.layout.grid for image in images], np.int32)
        skip = np.array([row.skip for row, _ in rows], np.int32)
        skip = skip if skip.any() else None
        return Inputs(out_tokens, lengths, out_index, packed, features, grid=grid, skip=skip)

    def _pack_images(
        self, images: list[Picture | None], tiles: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns tiles and, where they stand for tiles, features."""
        size = 0 if self.image_spec is None else self.image_spec.size
        if not tiles:
            return np.zeros((len(images), 0, size, size, 3), np.uint8), None
        first = images[0].tiles
        packed = np.zeros((len(images), tiles, *first.shape[1:]), first.dtype)
        for i, image in enumerate(images):
            packed[i, : len(image.tiles)] = image.tiles
        if packed.dtype == np.uint8:
            return packed, None
        return np.zeros((len(images), tiles, 0, 0, 3), np.uint8), packed

    # ---- groups of any mixture

    def bucket(
        self,
        texts: Sequence[str | prompts.Slotted | None],
        images: Sequence[Any],
        instruction: str | None = None,
        *,
        programs: buckets.Programs | None = None,
    ) -> buckets.Groups:
        """Groups rows of any mixture by length and tiles, short ones first.

        Images are read for their size now and decoded when the groups are read. `programs` are
        those there are; None: of all groups made here before.

        Returns:
          Groups, each with the places its rows had in the lists given.

        Raises:
          UserError: an unreadable image, an empty row, an image that does not fit; names the row.
        """
        layouts = self._layouts(images)
        rows = []
        for i, (text, layout) in enumerate(zip(texts, layouts, strict=True)):
            with _naming_row(i):
                rows.append(self.tokenize(text, layout is not None, instruction, layout=layout))
        return self._groups(rows, images, layouts, programs)

    def embed_rows(
        self,
        token_rows: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
        images: Sequence[Any] | None = None,
    ) -> buckets.Groups:
        """Groups rows that are tokenised already; `image_token_id` marks each image's place.

        Raises:
          UserError: an empty row, an id the model does not have, no or several places for an
            image, a row longer than the model reads.
        """
        images = [None] * len(token_rows) if images is None else images
        if len(images) != len(token_rows):
            raise UserError(f"{len(token_rows)} token rows but {len(images)} images")
        layouts = self._layouts(images)
        rows = []
        for i, (ids, layout) in enumerate(zip(token_rows, layouts, strict=True)):
            with _naming_row(i):
                row = Row(self._check_ids(ids, layout is not None), 0, 0)
                length = row.length(0 if layout is None else layout.positions)
                if length > self.max_tokens:
                    limit = self.max_tokens
                    raise UserError(f"{length} positions, the model reads {limit}: shorten the row")
                rows.append(row)
        return self._groups(rows, images, layouts)

    def _check_ids(self, ids: Sequence[int] | np.ndarray, has_image: bool) -> tuple[int, ...]:
        mark = self.image_token_id
        try:
            ids = tuple(map(operator.index, ids))
        except TypeError:
            raise UserError("token ids are whole numbers, a list of them for each row") from None
        slots = ids.count(mark)
        if not ids or slots != has_image:
            hint = f"; one {mark} stands for the whole image" if slots > 1 else ""
            raise UserError(
                f"{len(ids)} tokens with {slots} image slots ({mark}) and "
                f"{'an' if has_image else 'no'} image{hint}"
            )
        words = [token for token in ids if token != mark]
        limit = self._vocabulary
        wrong = [id for id in words if id < 0 or (limit is not None and id >= limit)]
        if wrong:
            raise UserError(f"token id {wrong[0]} is not one of the model's {limit or ''}".rstrip())
        return tuple(IMAGE_SLOT if token == mark else token for token in ids)

    def _layouts(self, images: Sequence[Any]) -> list[Layout | None]:
        def read(row: int) -> Layout:
            with _naming_row(row):
                return self.layout(*pictures.size_of(images[row]))

        layouts: list[Layout | None] = [None] * len(images)
        rows = [row for row, image in enumerate(images) if image is not None]
        with ThreadPoolExecutor() as pool:  # opening files is mostly waiting
            for row, layout in zip(rows, pool.map(read, rows), strict=True):
                layouts[row] = layout
        return layouts

    def _groups(
        self, rows: list[Row], images: Sequence[Any], layouts: list[Layout | None], programs=None
    ) -> buckets.Groups:
        shapes, real = [], 0
        for i, (row, layout) in enumerate(zip(rows, layouts, strict=True)):
            with _naming_row(i):
                shapes.append(self.shape_of(row, layout))
            real += row.length(0 if layout is None else layout.positions)

        def prepare(row: int) -> Picture:
            with _naming_row(row):
                return self.image(images[row])

        def pack(bucket: buckets.Bucket, pictures: list[Picture | None]) -> Inputs:
            found = [rows[i] for i in bucket.members]
            return self.group(
                list(zip(found, pictures, strict=True)), tokens=bucket.tokens, tiles=bucket.tiles
            )

        content = hash(tuple(sorted(hash(row.ids) for row in rows)))
        made = buckets.sort(shapes, self.limits, self.longest, programs or self.programs, content)
        return buckets.Groups(made, prepare, pack, tokens=real)

    def shape_of(self, row: Row, layout: Layout | None) -> tuple[int, int]:
        """Returns T and C of the group that a row belongs in.

        Raises:
          UserError: the row is longer than the model reads.
        """
        length = row.length(0 if layout is None else layout.positions)
        self.check_length(length)
        tiles = 0 if layout is None else self.transform.bucket(layout.tiles)
        return buckets.padded_length(length, self.longest), tiles

    @property
    def longest(self) -> int:
        """Is the most positions of a row, padding included."""
        return self.max_tokens if self._window is None else min(self._window, self.max_tokens)

    def check_length(self, length: int) -> None:
        """Refuses a row that attends to fewer positions than it has; the others are cut before.

        Raises:
          UserError: the row is longer than the model's window.
        """
        if self._window is not None and length > self._window:
            raise UserError(
                f"{length} positions exceed the model's sliding_window of {self._window}, which is "
                "not supported; use shorter rows (config.data.max_tokens)"
            )


@contextlib.contextmanager
def _naming_row(row: int):
    """Puts the row's number before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"row {row}: {error}") from None
