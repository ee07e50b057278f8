"""What a training run reads: its sources, and what a model computes once for all its steps.

Vision features of a frozen tower and embeddings of a frozen decoder are computed once and kept on
disk or in memory; the steps then read them by number.
"""

import collections
import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from unime_jax import report, runtime, sharding
from unime_jax.data import (
    couples,
    fingerprint,
    image_files,
    mmeb,
    nli,
    pipeline,
    shares,
    sources,
    task_pairs,
    teacher_vectors,
    text_sources,
)
from unime_jax.data.texts import Places
from unime_jax.embedder import Embedder
from unime_jax.tower_features import cache_features
from unime_jax.train_checks import check_data
from unime_jax.types import Batch, UserError

_LONG = 50_000  # rows whose measuring takes long enough to be shown


class TrainData:
    """Batches of one run, by step.

    Attributes:
      steps: of the whole run.
      counts: rows and positions of a batch.
      sets: names of the data sets.
      info: what batches are made of.
      shared: rows, T and C of the groups of each side, where batches have this process's rows alone
        (`shares.SharedBatches`); None where they are whole.
      fingerprint: tells what the rows are, see `data.fingerprint`.
    """

    shared: dict[str, list[tuple[int, int, int]]] | None = None

    def __init__(
        self,
        batches: pipeline.Batches,
        *,
        steps: int,
        epochs: float,
        threads: int,
        workers: int = 0,
        note: str = "",
        bad_file: pathlib.Path | None = None,
        mesh=None,
        fingerprint: Callable[..., dict[str, Any]] = dict,
    ):
        self._batches, self._threads, self._note = batches, threads, note
        self._workers, self._bad_file, self._begun = workers, bad_file, False
        self._made = batches
        if mesh is not None and sharding.processes(mesh) > 1:
            own = functools.partial(sharding.own_rows, mesh=mesh)
            self._made = shares.SharedBatches(batches, own, runtime.exchange)
            self.shared = self._made.sizes
        self.info, self.fingerprint = batches.info, fingerprint
        self.sets = batches.info.sets
        rows = sum(rows for rows, _, _ in batches.info.query_shapes)
        self.steps = max(1, round(epochs * batches.info.rows / rows)) if epochs else steps
        self.counts = {
            "rows": float(rows),
            "tokens": batches.info.tokens,
            "padded_share": batches.info.padded_share,
            "bad_rows": float(len(batches.bad)),
        }

    def batches(self, first: int) -> Iterator[Batch]:
        """Yields the batches of steps `first` to the last, made ahead of time.

        Raises:
          UserError: more rows are bad than config.data.max_bad_share allows.
        """
        how = {"threads": self._threads, "workers": self._workers}
        made = self._made.iterate(first, self.steps, **how)
        self._go_on(first)
        with contextlib.closing(made):
            try:
                self._list_bad()
                for batch in made:
                    self._list_bad()
                    yield batch
            except UserError as error:
                self._list_bad()
                listed = f"; all that were met are in {self._bad_file}" if self._bad_file else ""
                raise UserError(f"{error}{listed}") from None

    def _go_on(self, first: int) -> None:
        """Takes over the list of bad rows of an earlier start, or drops that of another run."""
        file = None if self._begun else self._bad_file
        self._begun = True  # not where readers that were killed are replaced
        if file and first:
            self._batches.bad.go_on(file)
        elif file and runtime.is_main():
            file.unlink(missing_ok=True)

    def _list_bad(self) -> None:
        """Counts the bad rows met so far, and lists them."""
        bad = self._batches.bad
        self.counts["bad_rows"] = float(len(bad))
        if self._bad_file and runtime.is_main():
            bad.list_in(self._bad_file)

    def rows_of(self, step: int) -> list[dict[str, Any]]:
        """Names the rows of a step's batch."""
        return self._batches.rows_of(step)

    def describe(self) -> str:
        """Returns what a batch is made of, a line each."""
        info = self._batches.info
        lines = [f"  {line}" for line in ([self._note] if self._note else []) + info.strata]
        lines.append(
            f"  {self.steps} steps, {self.steps * self.counts['rows'] / info.rows:.2f} epochs"
        )
        for side in ("query", "target", "negative"):
            shapes = getattr(info, f"{side}_shapes")
            groups = ", ".join(
                f"{rows} of {tokens} tokens" + (f" and {tiles} tile(s)" if tiles else "")
                for rows, tokens, tiles in shapes
            )
            lines += [f"  {side}: {groups}"] if shapes else []
        lines.append(
            f"  {info.tokens:.0f} tokens a batch, {info.padded_share:.0%} padding "
            f"({info.one_shape_share:.0%} if all rows had one shape), {info.cut_texts} of "
            f"{info.texts} texts longer than config.data.max_tokens are cut"
        )
        if len(self._batches.bad):
            lines.append(f"  left out, for they cannot be read: {self._batches.bad.kinds()} rows")
        if info.unused:
            lines.append(f"  too small for a row of each batch, not used: {', '.join(info.unused)}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Returns a note on skipped rows, "" if there were none."""
        bad = self._batches.bad
        if not len(bad):
            return ""
        listed = f", listed in {self._bad_file}" if self._bad_file else ""
        return f"; bad rows skipped: {len(bad)} ({bad.kinds()}{listed})"


def open_data(settings: dict[str, Any], embedder: Embedder) -> TrainData:
    """Opens the data of a run.

    Args:
      settings: the resolved configuration.
      embedder: the model before any adapter: it computes cached features and target embeddings.

    Raises:
      UserError: data that is missing or does not fit.
    """
    kind = check_data(settings)
    data, stage = settings["data"], settings["stage"]
    if reads_images(settings) and embedder.image_spec is None:
        raise UserError(f"config.model.path: the model of {embedder.directory} takes no images")
    features = vectors = None
    faults: list[str] = []  # of malformed rows
    note, batch_size = "", settings["train"]["batch_size"]
    if not reads_images(settings):
        found, texts, note = _open_texts(settings, faults)
        if stage == "distill":
            stored, _ = teacher_vectors.read(settings["teacher"]["vectors"], texts)
            vectors = _by_text(texts, stored)
            texts_of_row = _texts_of_row(found[0])
            if batch_size % texts_of_row:
                raise UserError(
                    f"config.train.batch_size={batch_size}: stage 1 counts sentences, and a row "
                    f"has {texts_of_row}; choose a multiple"
                )
            batch_size //= texts_of_row
    elif kind in ("tasks", "mmeb"):
        found = _open_tasks(settings, faults)
    else:
        pairs = sources.pairs(data["path"], "train", folder=_images(data), faults=faults)
        directions = ["image_to_text"] if stage == "align" else data["directions"]
        found = [part for way in directions for part in pairs.directed(way).by_source()]
        if data["features"]:
            if embedder.image_spec.kind != "grid":
                raise UserError(
                    "config.data.features: features of this model's images are not cached; leave "
                    "it empty"
                )
            features = cache_features(
                pairs, embedder, pathlib.Path(data["features"]), variants=data["variants"]
            )
        if stage == "align":
            texts = pairs.texts(others=data["extra_texts"] > 0)
            with report.Progress(len(texts), "embedding captions", unit="text") as progress:
                stored = embedder.embed(texts=texts, progress=progress.advance)
            vectors = _by_text(texts, stored)
    weights = dict(data["weights"])
    unknown = set(weights) - {source.name for source in found}
    if unknown:
        names = ", ".join(sorted({source.name for source in found}))
        raise UserError(
            f"config.data.weights: no set {', '.join(sorted(unknown))}; there are {names}"
        )
    whole = collections.Counter()
    for source in found:
        whole[source.name] += len(source)
    total = sum(map(len, found))
    with _measuring(total) as progress:
        batches = pipeline.Batches(
            found,
            embedder.preprocessor,
            batch_size=batch_size,
            seed=settings["seed"],
            max_tokens=data["max_tokens"],
            bins=data["length_bins"],
            joint=data.get("joint_bins", False),  # runs of old lack the key
            weights=[
                weights.get(source.name, 0.0) * len(source) / whole[source.name] for source in found
            ]
            if weights
            else None,
            temperature=data["temperature"],
            block=data["block"],
            other_texts=data["extra_texts"],
            features=features,
            augment=data["variants"] > 1,
            vectors=vectors,
            max_bad_share=data["max_bad_share"],
            faults=faults,
            cache=runtime.cache_directory() / "lengths",
            progress=progress,
        )
    train = settings["train"]
    return TrainData(
        batches,
        steps=train["steps"],
        epochs=train["epochs"],
        threads=data["threads"],
        workers=data["workers"],
        note=note,
        bad_file=None if train["replay"] else pathlib.Path(settings["output"]) / "bad_rows.jsonl",
        mesh=embedder.mesh,
        fingerprint=functools.partial(fingerprint.fingerprint, found),
    )


def image_start(data: dict[str, Any]) -> pathlib.Path:
    """Returns the directory that image paths of own pairs start from."""
    return pathlib.Path(data.get("images") or pathlib.Path(data["path"]).parent).expanduser()


def _images(data: dict[str, Any]) -> image_files.Folder:
    """Returns where the images of own pairs lie."""
    root = data.get("image_root") or None  # runs of old lack the key
    return image_files.Folder(image_start(data), root, option="config.data.image_root")


@contextlib.contextmanager
def _measuring(rows: int):
    """Gives a progress callback; silent where there is little to do."""
    if rows < _LONG:
        yield lambda count: None
        return
    with report.Progress(rows, "measuring texts", unit="row") as progress:
        yield progress.advance


def _open_tasks(settings: dict[str, Any], faults: list[str]) -> list[sources.Source]:
    """Opens pairs that bring their own wording: MMEB's sets, or a user's file."""
    data = settings["data"]
    path = pathlib.Path(data["path"]).expanduser()
    if not mmeb.is_prepared(path):
        judged = settings["loss"]["k"] if settings["stage"] == "judge" else 0
        return task_pairs.read(
            path,
            folder=_images(data),
            judged=judged,
            rows_per_set=data["set_rows"],
            faults=faults,
        )
    return mmeb.open_sets(path, data["sets"], data["set_rows"])


def reads_images(settings: dict[str, Any]) -> bool:
    """Says whether a run's rows may have images; without, its model is the decoder alone."""
    return settings["stage"] != "distill" and not nli.is_nli(settings["data"]["path"])


def _open_texts(
    settings: dict[str, Any], faults: list[str]
) -> tuple[list[sources.Source], Sequence[str], str]:
    """Returns the sources of a run on texts, all their texts, and a note on what was left out."""
    path = settings["data"]["path"]
    if not nli.is_nli(path):
        if pathlib.Path(path).suffix == ".jsonl":
            texts = sources.sentences(path, faults)
            return [text_sources.Texts(texts)], texts, ""
        return *couples.read(path), ""
    found = nli.read(path, faults)
    return [text_sources.Triples(found)], found.sentences, found.describe()


def _texts_of_row(source: sources.Source) -> int:
    """Counts the sentences of a row: each is an item of a stage-1 batch."""
    row = source[0]
    return sum(text is not None for text in (row.query_text, row.target_text, row.negative_text))


def _by_text(texts: Sequence[str], stored) -> Callable[[list[str]], np.ndarray]:
    places = Places(texts)
    return lambda wanted: stored[places(wanted)]
