"""Embeds what the small benchmarks ask for: with every model, the teacher and the baselines."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from unime_jax import embedder, metrics, report, train_data, weights
from unime_jax.benchmarks import smol
from unime_jax.data import sources
from unime_jax.types import UserError, flatten

TITLES = {
    "raw": "raw model",
    "stage1": "after stage 1",
    "align": "after alignment",
    "stage2": "after stage 2",
}
IDF, RIDGE, TEACHER = "mean input embedding, by IDF", "ridge regression", "teacher"


@dataclasses.dataclass
class Measured:
    """Vectors of everything, by row of the tables and in their order.

    Attributes:
      sentences, pairs: of models and baselines.
      teacher: the teacher's sentences, or None.
      strength: the penalty that the ridge baseline chose, or None without one.
    """

    sentences: dict[str, smol.SentenceVectors] = dataclasses.field(default_factory=dict)
    pairs: dict[str, smol.PairVectors] = dataclasses.field(default_factory=dict)
    teacher: smol.SentenceVectors | None = None
    strength: float | None = None


class _Encoder:
    """A loaded model whose work shows as progress, under the name of its row."""

    def __init__(self, path: str, *, title: str, dtype: str):
        self.title = title
        self.model = embedder.load(path, dtype=dtype)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        with report.Progress(len(texts), f"{self.title}: texts", unit="text") as progress:
            return self.model.embed(texts=list(texts), progress=progress.advance)

    def images(self, images: Sequence[bytes]) -> np.ndarray:
        with report.Progress(len(images), f"{self.title}: images", unit="image") as progress:
            return self.model.embed(images=list(images), progress=progress.advance)

    def pooled(self, images: Sequence[bytes]) -> np.ndarray:
        """Means the tower's features over each picture; zeros where it cannot be read."""
        size = self.model.image_spec.size
        tiles, readable = np.zeros((len(images), size, size, 3), np.uint8), []
        for i, image in enumerate(images):
            try:
                tiles[i] = self.model.preprocessor.image(image).tiles[0]
                readable.append(True)
            except UserError:
                readable.append(False)
        title = f"{self.title}: vision features"
        with report.Progress(len(images), title, unit="image") as progress:
            pooled = [
                self.model.featurise(tiles[i : i + 256], progress=progress.advance).mean(axis=1)
                for i in range(0, len(images), 256)
            ]
        return np.concatenate(pooled) * np.array(readable)[:, None]


def read(config) -> tuple[smol.Sentences, smol.Pairs]:
    """Reads what is evaluated."""
    path, limit = config.data.path, config.limit or None
    heldout = sources.split_sentences(path, "heldout")[:limit]
    try:
        couples = sources.split_sentences(path, "gloss_to_example")[:limit]
    except UserError as error:
        if "has no split" not in str(error):
            raise
        couples = []  # data prepared without WordNet
    sentences = smol.Sentences(
        [row["text"] for row in heldout],
        [row["text"] for row in couples],
        [row["second"] for row in couples],
    )
    return sentences, read_pairs(path, config.data.split, limit)


def read_pairs(path, split: str, limit: int | None = None) -> smol.Pairs:
    """Reads pairs that `prepare` wrote: all, or up to `limit` of them, evenly spread."""
    found = sources.pairs(path, split)
    chosen = smol.spread(len(found), limit or len(found))
    rows = [found.rows[i] for i in chosen]
    return smol.Pairs(
        [found.image(int(i)) for i in chosen],
        [row.caption for row in rows],
        [row.key for row in rows],
        [row.seen for row in rows],
    )


def validation_recall(model, pairs: smol.Pairs) -> dict[str, float]:
    """Returns recall in both directions, under the names that metrics files and plots know."""
    vectors = smol.embed_pairs(
        pairs,
        lambda texts: model.embed(texts=list(texts)),
        lambda images: model.embed(images=list(images)),
    )
    found = {}
    for direction, task in vectors.retrievals(pairs.keys).items():
        for k, recall in metrics.recall_at_k(task.similarity, task.relevant, (1, 10)).items():
            found[f"validation/{direction.replace(' ', '_')}_recall_at_{k}"] = recall
    return found


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Sentences that no stage trains on and that are no queries of the report's retrieval.

    Attributes:
      texts: the sentences.
      couples: int[n, 2], places of a definition and of its example.
      embed: returns f32[N, E], the teacher's vectors of the sentences.
    """

    texts: list[str]
    couples: np.ndarray
    embed: Callable[[], np.ndarray]

    @functools.cached_property
    def teacher(self) -> np.ndarray:
        """The teacher's vectors, f32[N, E], made when they are first asked for."""
        return self.embed()


def read_heldout(path, *, teacher: str, instruction: str | None = None) -> HeldOut:
    """Reads the held-out sentences of prepared data, and opens the teacher that will embed them."""
    rows = sources.split_sentences(path, "heldout")
    by_meaning: dict[str, dict[str, int]] = {}
    for place, row in enumerate(rows):
        if row["synset"]:
            by_meaning.setdefault(row["synset"], {})[row["kind"]] = place
    whole = [found for found in by_meaning.values() if len(found) == 2]
    couples = np.array([[w["gloss"], w["example"]] for w in whole], int).reshape(-1, 2)
    texts = [row["text"] for row in rows]
    found = weights.find(teacher)

    def embed() -> np.ndarray:
        model = embedder.load_weights(found, dtype="float32")
        return model.embed(texts=texts, instruction=instruction)

    return HeldOut(texts, couples, embed)


def validation_sentences(model, heldout: HeldOut) -> dict[str, float]:
    """Returns agreement with the teacher, and recall of a definition's own example."""
    vectors = model.embed(texts=heldout.texts)
    found = {"validation/spearman": metrics.similarity_spearman(vectors, heldout.teacher)}
    if len(heldout.couples):
        definitions, examples = vectors[heldout.couples[:, 0]], vectors[heldout.couples[:, 1]]
        own = np.arange(len(examples))
        recall = metrics.recall_at_k(definitions @ examples.T, own, (10,))[10]
        found["validation/definition_recall_at_10"] = recall
    return found


def in_order(section) -> dict[str, str]:
    """Returns what a section names: stages in the order they run, for ConfigDict sorts its keys."""
    names = [name for name in TITLES if name in section]
    names += [name for name in section if name not in TITLES]
    return {name: str(section[name]) for name in names if section[name]}


def measure(config, sentences: smol.Sentences, pairs: smol.Pairs) -> Measured:
    """Embeds everything with every model, one model in memory at a time."""
    measured = Measured()
    features = None
    for name, path in in_order(config.models).items():
        encoder = _Encoder(path, title=TITLES.get(name, name), dtype=config.dtype)
        if not measured.sentences:
            measured.sentences |= _idf_row(config, encoder.model, sentences)
        measured.sentences[encoder.title] = smol.embed_sentences(sentences, encoder.texts)
        if encoder.model.image_spec is None:
            continue
        if features is None and config.teacher.path:
            features = _ridge_features(config, encoder, pairs)
        measured.pairs[encoder.title] = smol.embed_pairs(pairs, encoder.texts, encoder.images)
    if config.teacher.path:
        teacher = _Encoder(config.teacher.path, title=TEACHER, dtype=config.dtype)
        measured.teacher = smol.embed_sentences(sentences, teacher.texts)
        if features is not None:
            row, measured.strength = _ridge_row(config, teacher, pairs, features)
            measured.pairs = {RIDGE: row, **measured.pairs}
    return measured


def _idf_row(config, model, sentences: smol.Sentences) -> dict[str, smol.SentenceVectors]:
    """Returns the baseline of the model's own input embeddings, {} where it has none."""
    flat = flatten(model.params)
    table = next((v for k, v in flat.items() if k.endswith("embed_tokens/embedding")), None)
    if table is None:
        return {}

    def tokens(text: str) -> tuple[int, ...]:
        row = model.preprocessor.tokenize(text, False)
        return row.ids[row.start : row.stop]  # without the prompt

    corpus = [tokens(text) for text in sources.sentences(config.data.path)]
    table = np.asarray(table, np.float32)
    row = smol.embed_sentences(
        sentences, lambda texts: smol.idf_mean(table, [tokens(text) for text in texts], corpus)
    )
    return {IDF: row}


@dataclasses.dataclass(frozen=True)
class _RidgeFeatures:
    """Pooled tower features; rows of `train` are zero where the image cannot be read."""

    captions: list[str]
    train: np.ndarray
    validation: np.ndarray
    evaluated: np.ndarray


def _ridge_features(config, encoder: _Encoder, pairs: smol.Pairs) -> _RidgeFeatures:
    train = sources.pairs(config.data.path, "train")
    captions = np.array(train.captions())
    if config.data.features and not config.limit:
        stored = train_data.cache_features(
            train,
            encoder.model,
            pathlib.Path(config.data.features),
            variants=config.data.variants,
        )
        # Image by image and not at once: the file may be larger than memory.
        pooled = np.stack([image[0].astype(np.float32).mean(axis=0) for image in stored])
    else:
        chosen = smol.spread(len(train), 10 * config.limit or len(train))
        pooled = encoder.pooled([train.image(int(i)) for i in chosen])
        captions = captions[chosen]
    validation = read_pairs(config.data.path, "validation")
    return _RidgeFeatures(
        captions.tolist(), pooled, encoder.pooled(validation.images), encoder.pooled(pairs.images)
    )


def _ridge_row(
    config, teacher: _Encoder, pairs: smol.Pairs, features: _RidgeFeatures
) -> tuple[smol.PairVectors, float]:
    """Fits the ridge baseline on the training pairs; returns its vectors and its strength."""
    kept = features.train.any(axis=1)
    captions = [text for text, keep in zip(features.captions, kept, strict=True) if keep]
    unique = list(dict.fromkeys(captions))
    place = {text: i for i, text in enumerate(unique)}
    targets = teacher.texts(unique)[[place[text] for text in captions]]
    validation = read_pairs(config.data.path, "validation")
    validation_vectors = teacher.texts(validation.captions)

    def quality(ridge: smol.Ridge) -> float:
        vectors = smol.PairVectors(ridge.predict(features.validation), validation_vectors)
        task = vectors.retrievals(validation.keys)["image to text"]
        return float(np.mean(1 / (1 + metrics.ranks(task.similarity, task.relevant))))

    ridge = smol.fit_ridge(features.train[kept], targets, quality)
    vectors = smol.PairVectors(ridge.predict(features.evaluated), teacher.texts(pairs.captions))
    return vectors, ridge.strength
