"""Embeds the items of a benchmark, each once, whatever the benchmarks and runs that ask for it."""

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unime_jax import file_hashes, report
from unime_jax.data import prompts
from unime_jax.data.eval_items import identity
from unime_jax.data.sources import ImageRef, Item
from unime_jax.data.stream import Item as Row
from unime_jax.evaluation import hosts
from unime_jax.evaluation.store import KEY_BYTES, VectorStore
from unime_jax.types import UserError

# (rows, bad) -> keys and f32[n, E] of a group of rows at a time, in any order; `bad` is told the
# key of a row that cannot be embedded, and why.
Model = Callable[
    [Iterable[Row], Callable[[Any, str], None]], Iterator[tuple[Sequence[bytes], np.ndarray]]
]
_IMAGE_WORK = 2000.0  # letters of text that cost about what an image does; for the time left
_READERS = 16
_TOGETHER = 1024  # new rows; sets with fewer are embedded together, in fewer shapes


@dataclasses.dataclass(frozen=True)
class Wording:
    """How items become rows of the model.

    Attributes:
      raw: the prompt takes texts as they are, the image's slot among them.
      sum: an item with an image and a text is the sum of the two, each a row of its own.
    """

    raw: bool
    sum: bool = False

    def rows(self, item: Item) -> list[tuple[str | prompts.Slotted | None, ImageRef | None]]:
        """Returns the rows whose vectors, summed, are the item's.

        Raises:
          UserError: a text that speaks of an image which is not there.
        """
        text, image = item.text, item.image
        if image is None:
            if text and prompts.MMEB_SLOT in text:
                raise UserError(f"the text has {prompts.MMEB_SLOT} but there is no image")
            return [(text, None)]
        if self.raw:
            found = prompts.slotted(text or "")
            if isinstance(found, str):  # MMEB puts an image on a line of its own
                found = prompts.Slotted("", f"\n{found}" if found else "")
            return [(found, image)]
        words = (text or "").replace(prompts.MMEB_SLOT, "").strip() or None
        if self.sum and words:
            return [(words, None), (None, image)]
        return [(words, image)]


@dataclasses.dataclass(frozen=True)
class _Part:
    text: str | prompts.Slotted | None
    image: ImageRef | None

    @property
    def work(self) -> float:
        return (_IMAGE_WORK if self.image else 0.0) + len(str(self.text or "")) + 100


class Encoder:
    """Holds the vectors of items by number.

    Attributes:
      failed: why the rows under these keys have no vector.
      embedded: rows that went through the model in this process.
      canonical: int[M], for each item the first one with the very same content.
      usable: bool[M], whether an item has a vector; known of those that `embed` was given.
      same: int[M], for each usable item the first one with the very same vector.

    Args:
      items: of all benchmarks that are to be measured.
      wording: see `Wording`.
      store: the model's.
      hashes: of image files.
      open_model: loads the model; called if any row needs it.
    """

    def __init__(
        self,
        items: Sequence[Item],
        wording: Wording,
        store: VectorStore,
        hashes: file_hashes.FileHashes,
        open_model: Callable[[], Model],
    ):
        self._store, self._hashes, self._open = store, hashes, open_model
        self._model: Model | None = None
        self.failed: dict[bytes, str] = {}
        self.embedded = 0
        self._parts: dict[bytes, _Part] = {}
        digests = self._digests(items)
        self._keys = [self._key(item, wording, digests) for item in items]
        first: dict[tuple[bytes, ...], int] = {}
        places = (first.setdefault(keys, i) for i, keys in enumerate(self._keys))
        self.canonical = np.fromiter(places, np.int64, len(self._keys))
        self.usable = np.zeros(len(self._keys), bool)
        self.same = np.arange(len(self._keys))
        self._first: dict[tuple[int, ...], int] = {}
        self._pending = {key for key in self._parts if key not in store}
        self._work = sum(self._parts[key].work for key in self._pending)
        self._clock = _Clock()

    @property
    def rows(self) -> int:
        """Counts the different rows of all items."""
        return len(self._parts)

    @property
    def missing(self) -> int:
        """Counts the rows that have neither a vector nor a fault."""
        return len(self._pending)

    def describe(self) -> str:
        """Says what there is to do."""
        return (
            f"{len(self._keys)} items, {self.rows} different rows; {self.rows - self.missing} of "
            f"them have vectors, {self.missing} to embed"
        )

    def _digests(self, items: Iterable[Item]) -> dict[pathlib.Path | str, bytes | str]:
        """Hashes every image once; where one cannot be read, says why."""
        images = {identity(item.image): item.image for item in items if item.image is not None}

        def digest(image: ImageRef) -> bytes | str:
            try:
                if image.file is not None and image.file.is_file():
                    return self._hashes(image.file)
                return file_hashes.of_bytes(image.load())
            except UserError as error:
                return str(error)
            except OSError as error:
                return f"{image.name}: cannot be read ({error.strerror})"

        found: dict[pathlib.Path | str, bytes | str] = {}
        if images:
            with (
                ThreadPoolExecutor(_READERS) as pool,
                report.Progress(len(images), "looking through images", unit="image") as progress,
            ):
                for image, value in zip(images, pool.map(digest, images.values()), strict=True):
                    found[image] = value
                    progress.advance()
        return found

    def _key(
        self, item: Item, wording: Wording, digests: Mapping[pathlib.Path | str, bytes | str]
    ) -> tuple[bytes, ...]:
        keys = []
        try:
            rows = wording.rows(item)
        except UserError as error:
            return (self._fail(item, str(error)),)
        found = b"" if item.image is None else digests[identity(item.image)]
        if isinstance(found, str):
            return (self._fail(item, found),)
        for text, image in rows:
            digest = b"" if image is None else found
            if isinstance(text, prompts.Slotted):
                text_bytes = b"s" + text.before.encode() + b"\0" + text.after.encode()
            else:
                text_bytes = b"" if text is None else b"t" + text.encode()
            key = hashlib.blake2b(digest + b"\0" + text_bytes, digest_size=KEY_BYTES).digest()
            self._parts.setdefault(key, _Part(text, image))
            keys.append(key)
        return tuple(keys)

    def _fail(self, item: Item, reason: str) -> bytes:
        name = f"{item.text}\0{identity(item.image) if item.image else ''}"
        name = name.encode(errors="surrogatepass")  # a file's name need not be UTF-8
        key = hashlib.blake2b(name, digest_size=KEY_BYTES, person=b"failed").digest()
        self.failed[key] = reason
        return key

    # ---- embedding

    def embed(self, wanted: Mapping[str, Int[np.ndarray, "N"]]) -> Iterator[str]:
        """Embeds what has no vector yet and yields each set's name once all of it is done.

        What cannot be embedded is in `failed` then. Small sets are embedded together.

        Args:
          wanted: items of each set.
        """
        done = 0
        for batch in self._batches(wanted):
            first, done = done + 1, done + len(batch)
            which = f"{first}-{done}/{len(wanted)}" if len(batch) > 1 else f"{done}/{len(wanted)}"
            numbers = np.unique(np.concatenate([wanted[name] for name in batch]))
            self._embed(numbers, f"{which} {batch[0]}" + (" ..." if len(batch) > 1 else ""))
            yield from batch

    def _embed(self, numbers: Int[np.ndarray, "N"], title: str) -> None:
        wanted = dict.fromkeys(key for i in numbers.tolist() for key in self._keys[i])
        todo = hosts.agreed([key for key in wanted if key in self._pending])
        if todo:
            self._run(todo, title)
        self._note(numbers)

    def _run(self, todo: list[bytes], title: str) -> None:
        share = hosts.share(todo)
        if share and self._model is None:
            self._model = self._open()
        with report.Progress(len(share), title, unit="item") as progress:

            def bad(key: bytes, reason: str) -> None:
                self.failed[key] = reason
                progress.advance(1, self._done([key]))

            try:
                for keys, vectors in self._model(self._rows(share, bad), bad) if share else ():
                    finite = np.isfinite(vectors).all(axis=1)
                    for place in np.flatnonzero(~finite):
                        bad(keys[place], "the model gave no finite vector")
                    kept = [keys[place] for place in np.flatnonzero(finite)]
                    self._store.add(kept, vectors[finite])
                    self.embedded += len(kept)
                    progress.advance(len(kept), self._done(kept))
            finally:
                self._store.flush()
        hosts.exchange(share, self._store, self.failed)
        self._pending.difference_update(todo)

    def _batches(self, wanted: Mapping[str, Int[np.ndarray, "N"]]) -> Iterator[list[str]]:
        """Yields names of sets that are embedded together, in all processes the same.

        Args:
          wanted: items of each set.
        """
        ends = np.zeros(len(wanted), np.int32)
        seen, done = set(), set()
        for place, numbers in enumerate(wanted.values()):
            keys = {key for i in numbers.tolist() for key in self._keys[i]}
            seen |= (keys & self._pending) - done
            if len(seen) >= _TOGETHER:
                ends[place] = 1
                done |= seen
                seen = set()
        # What has vectors here may have none in another process, and each batch is awaited by all.
        batch = []
        for name, end in zip(wanted, hosts.first_ones(ends), strict=True):
            batch.append(name)
            if end:
                yield batch
                batch = []
        if batch:
            yield batch

    def _rows(self, keys: Sequence[bytes], bad: Callable[[bytes, str], None]) -> Iterator[Row]:
        for key in keys:
            part = self._parts.get(key)
            if part is None:  # process 0 asked for it: its files are not ours
                bad(key, f"not among the files of process {hosts.index()}")
                continue
            image = part.image
            try:
                yield Row(key, part.text, None if image is None else image.file or image.load())
            except UserError as error:
                bad(key, str(error))

    def _done(self, keys: Sequence[bytes]) -> str:
        """Counts finished rows and returns how far the whole is."""
        self._pending.difference_update(keys)
        parts = [self._parts[key] for key in keys if key in self._parts]
        left = hosts.count() * sum(part.work for part in parts)
        return self._clock.advance(left, self._work)

    # ---- vectors

    def reason(self, number: int) -> str:
        """Returns why an item has no vector, "" if it has one."""
        return next((self.failed[key] for key in self._keys[number] if key in self.failed), "")

    def problems(self, items: Sequence[Item], numbers: Int[np.ndarray, "N"]) -> dict[str, str]:
        """Returns which of these items have no vector, by name, and why."""
        found: dict[str, str] = {}
        for number in numbers[~self.usable[numbers]].tolist():
            item = items[number]
            name = item.image.name if item.image else repr((item.text or "")[:60])
            found.setdefault(name, self.reason(number))
        return found

    def vectors(self, numbers: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N E"]:
        """Returns unit rows of items that have a vector."""
        groups = [self._keys[i] for i in numbers.tolist()]
        if all(len(keys) == 1 for keys in groups):
            return self._store.vectors([keys[0] for keys in groups])
        starts = np.cumsum([0, *map(len, groups[:-1])])
        rows = self._store.vectors([key for keys in groups for key in keys])
        sums = np.add.reduceat(rows, starts, axis=0)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)

    def _note(self, numbers: Int[np.ndarray, "N"]) -> None:
        """Looks which items have a vector by now, and which have the same one."""
        for i in numbers.tolist():
            keys = self._keys[i]
            if all(key in self._store for key in keys):
                self.usable[i] = True
                self.same[i] = self._first.setdefault(tuple(self._store.hashes(keys).tolist()), i)


class _Clock:
    """Tells how much of all work is done and how long the rest takes."""

    def __init__(self):
        self._started: float | None = None
        self._first = self._done = 0.0

    def advance(self, work: float, total: float) -> str:
        now = time.monotonic()
        self._done += work
        if self._started is None:  # the first rows compile: they are no measure
            self._started, self._first = now, self._done
        text = f"all {min(1.0, self._done / max(total, 1e-9)):.0%}"
        if self._done > self._first and now > self._started:
            pace = (now - self._started) / (self._done - self._first)
            text += f", {report.format_seconds(pace * max(total - self._done, 0.0))} left"
        return text
