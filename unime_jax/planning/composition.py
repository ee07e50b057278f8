"""What a batch is made of: read from the data where it is at hand, else typical of it."""

import contextlib
import dataclasses
import pathlib
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from unime_jax import train_data
from unime_jax.data import (
    mixture,
    mmeb_sets,
    mmeb_synthetic,
    preprocess,
    prompts,
    strata,
    teacher_vectors,
)
from unime_jax.embedder import PREPARATION, Embedder
from unime_jax.planning.backbones import Backbone
from unime_jax.types import UserError

Shape = tuple[int, int, int]
SIDES = ("query", "target", "negative")

# What stands for data that is not at hand.
TOKENS_A_WORD = 1.35  # of English by Llama's tokenizer
_TOKENS_A_TEMPLATE_WORD = 2  # marks and line ends are tokens of their own
_SAMPLE = 20  # every so-manieth row is drawn
_NLI_ROWS, _NLI_WORDS = 275_600, ((14, 60), (8, 30), (8, 30))  # sent0, sent1, hard_neg
_PAIR_ROWS, _CAPTION_WORDS = 4_500, (4, 12)
_TEACHER_WIDTH = 4096  # NV-Embed-v2


@dataclasses.dataclass(frozen=True)
class Composition:
    """A batch without its arrays.

    Attributes:
      query, target, negative: (rows, T, C) of each group.
      rows: B, rows of the batch.
      steps: of the whole run.
      sets: names of the data sets.
      real_tokens: positions of a batch that are no padding, on average.
      vectors: rows and width of the vectors that come with a batch, or None.
      judged: hard negatives of each row that a judge has scored.
      negative_ids: whether negatives bring an identity.
      features: whether images come as cached features.
      source: where all this is from, a line for the report.
    """

    query: tuple[Shape, ...]
    target: tuple[Shape, ...]
    negative: tuple[Shape, ...]
    rows: int
    steps: int
    sets: tuple[str, ...]
    real_tokens: float
    vectors: tuple[int, int] | None = None
    judged: int = 0
    negative_ids: bool = False
    features: bool = False
    source: str = ""

    def encoded(self, devices: int = 1) -> list[Shape]:
        """Lists the groups of a batch as they are merged (`chunks.merge`) and padded to devices."""
        found = Counter()
        for groups in (self.query, self.target, self.negative):
            for rows, tokens, tiles in groups:
                found[tokens, tiles] += rows
        return [(-(-rows // devices) * devices, *shape) for shape, rows in found.items()]

    @property
    def padded_tokens(self) -> int:
        groups = (*self.query, *self.target, *self.negative)
        return sum(rows * tokens for rows, tokens, _ in groups)


def find(settings: dict[str, Any], backbone: Backbone, model) -> Composition:
    """Returns what the batches of a run are made of.

    Args:
      settings: the resolved configuration.
      backbone: the model's files.
      model: the abstract module.

    Raises:
      UserError: data that is there and does not fit.
    """
    missing = _missing(settings, backbone)
    if missing:
        return _typical(settings, model, missing)
    return _measured(settings, backbone, model)


def _missing(settings: dict[str, Any], backbone: Backbone) -> str:
    """Names what of a run's data is not at hand; "" if all is."""
    data = settings["data"]
    wanted = {"config.data.path": data["path"]}
    if settings["stage"] == "distill":
        wanted["config.teacher.vectors"] = settings["teacher"]["vectors"]
    for key, path in wanted.items():
        if not path or not pathlib.Path(path).expanduser().exists():
            return f"{key}={path} is not there"
    if backbone.directory is None or not any(backbone.directory.glob("tokenizer*")):
        return "the model's tokenizer is not at hand"
    return ""


class Unread(Embedder):
    """Gives vectors of the right shape without a model: plans need no more."""

    def embed(self, texts=None, images=None, instruction=None, **options) -> np.ndarray:
        del images, instruction, options
        return np.broadcast_to(np.zeros(1, np.float32), (len(texts), self.embedding_width))


def _measured(settings: dict[str, Any], backbone: Backbone, model) -> Composition:
    """Reads the lengths of the rows that training would read."""
    features = bool(settings["data"]["features"])
    bare = {**settings, "data": {**settings["data"], "features": ""}}  # the tower is not run here
    preparation = {key: settings["data"][key] for key in PREPARATION}
    embedder = Unread(model, directory=backbone.directory, **preparation)
    with contextlib.redirect_stdout(sys.stderr):
        data = train_data.open_data(bare, embedder)
    info = data.info
    rows = sum(count for count, _, _ in info.query_shapes)
    judged = settings["stage"] == "judge"
    return Composition(
        tuple(info.query_shapes),
        tuple(info.target_shapes),
        tuple(info.negative_shapes),
        rows,
        data.steps,
        info.sets,
        info.tokens,
        vectors=_vectors(settings, embedder.embedding_width),
        judged=settings["loss"]["k"] if judged else 0,
        negative_ids=bool(info.negative_shapes) and not judged,
        features=features,
        source=f"{info.rows} rows of config.data.path",
    )


def _vectors(settings: dict[str, Any], own_width: int) -> tuple[int, int] | None:
    """Returns rows and width of a batch's vectors: one a sentence, or one a caption."""
    if settings["stage"] not in ("distill", "align"):
        return None
    width = own_width
    if settings["stage"] == "distill":
        path = settings["teacher"]["vectors"]
        there = path and pathlib.Path(path).expanduser().exists()
        width = teacher_vectors.read(path)[0].shape[1] if there else _TEACHER_WIDTH
    return settings["train"]["batch_size"], width


@dataclasses.dataclass(frozen=True)
class _Typical:
    """Lengths of a source's rows, drawn.

    Attributes:
      name: of the set.
      rows: that the source would have.
      words: int[n, sides] of a sample; 0: a side that is not encoded.
      images: which sides have one.
      copies: rows that a row has on each side: k negatives, else 1.
    """

    name: str
    rows: int
    words: np.ndarray
    images: tuple[bool, bool, bool]
    copies: tuple[int, int, int] = (1, 1, 1)


def _typical(settings: dict[str, Any], model, missing: str) -> Composition:
    """Draws lengths as they are in the data sets that a stage is meant for, and bins them."""
    data, stage = settings["data"], settings["stage"]
    reads_images = train_data.reads_images(settings)
    if not reads_images:
        found, what = [_sentences()], "NLI"
    elif data["features"] or stage == "align":
        found, what = _captions(settings), "short captions"
    else:
        found, what = _mmeb(settings), "MMEB"
    texts = 3 if stage == "distill" else 1
    batch = settings["train"]["batch_size"] // texts
    layout = _layout(settings, model) if reads_images else None
    positions = 0 if layout is None else layout.positions
    lengths = {n: _tokens(source, settings, positions) for n, source in enumerate(found)}
    sizes = [source.rows for source in found]
    weights = dict(data["weights"])
    per_source = mixture.shares(
        sizes,
        batch,
        weights=[weights.get(source.name, 0.0) for source in found] if weights else None,
        temperature=data["temperature"],
        block=data["block"],
    )
    used = {n: lengths[n] for n, count in enumerate(per_source) if count}
    divided, counts = strata.divide(
        used,
        {n: found[n].images for n in used},
        per_source,
        data["length_bins"],
        joint=data["joint_bins"],
    )
    shapes, real = [Counter(), Counter(), Counter()], 0.0
    for stratum, count in zip(divided, counts, strict=True):
        source = found[stratum.source]
        for side, tokens in enumerate(stratum.tokens):
            if tokens:
                tiles = layout.tiles if source.images[side] else 0
                rows = count * source.copies[side]
                shapes[side][tokens, tiles] += rows
                real += rows * float(stratum.lengths[:, side].mean())
    groups = [tuple((rows, *shape) for shape, rows in sorted(side.items())) for side in shapes]
    train, total = settings["train"], sum(sizes)
    steps = max(1, round(train["epochs"] * total / batch)) if train["epochs"] else train["steps"]
    judged = settings["loss"]["k"] if stage == "judge" else 0
    return Composition(
        *groups,
        rows=batch,
        steps=steps,
        sets=tuple(dict.fromkeys(source.name for source in found)),
        real_tokens=real,
        vectors=_vectors(settings, model.embedding_width),
        judged=judged,
        negative_ids=bool(groups[2]) and not judged,
        features=bool(data["features"]),
        source=f"assumed: lengths typical of {what}, for {missing}",
    )


def _layout(settings: dict[str, Any], model):
    """Returns what an image takes of its row."""
    if model.image_spec is None:
        raise UserError("config.model.path: the model takes no images, and the stage reads them")
    data = settings["data"]
    return preprocess.Preprocessor(
        "",
        model.image_spec,
        prompt=data["prompt"],
        max_tokens=data["max_tokens"],
        image_size=data["image_size"],
        image_crops=data["image_crops"],
    ).fixed_layout


def _tokens(source: _Typical, settings: dict[str, Any], positions: int) -> np.ndarray:
    """Turns words into positions: prompt, text, and the image's."""
    data = settings["data"]
    template = prompts.TEMPLATES.get(data["prompt"])
    around = 0
    if template is not None and not template.raw:
        around = _TOKENS_A_TEMPLATE_WORD * len(template.text.replace("{text}", "").split())
    tokens = 1 + around + np.rint(TOKENS_A_WORD * source.words).astype(np.int32)
    tokens = np.minimum(tokens, data["max_tokens"]) + positions * np.array(source.images)
    return np.where(source.words == 0, 0, tokens).astype(np.int32)


def _log_normal(
    rng: np.random.Generator, words: Sequence[tuple[int, int]], rows: int
) -> np.ndarray:
    drawn = [mmeb_synthetic.draw_counts(rng, side, rows) for side in words]
    return np.stack(drawn, axis=1)


def _sentences() -> _Typical:
    words = _log_normal(np.random.default_rng(0), _NLI_WORDS, _NLI_ROWS // _SAMPLE)
    return _Typical("nli", _NLI_ROWS, words, (False, False, False))


def _captions(settings: dict[str, Any]) -> list[_Typical]:
    rng = np.random.default_rng(0)
    captions = _log_normal(rng, (_CAPTION_WORDS, _CAPTION_WORDS), _PAIR_ROWS // 4)
    captions[:, 0] = 1  # the image's side
    align = settings["stage"] == "align"
    found = []
    for way in ("image_to_text",) if align else settings["data"]["directions"]:
        forward = way == "image_to_text"
        words = np.pad(captions if forward else captions[:, ::-1], [(0, 0), (0, 1)])
        words[:, 1] *= not align
        found.append(_Typical("pairs", _PAIR_ROWS, words, (forward, not forward, False)))
    return found


def _mmeb(settings: dict[str, Any]) -> list[_Typical]:
    data, found = settings["data"], []
    judged = settings["loss"]["k"] if settings["stage"] == "judge" else 0
    for number, known in enumerate(mmeb_sets.SETS):
        if data["sets"] and known.name not in data["sets"]:
            continue
        rows = min(known.used, data["set_rows"] or known.used)
        rng = np.random.default_rng(number)
        words = mmeb_synthetic.word_counts(known.name, max(64, rows // _SAMPLE), rng)
        words = np.concatenate([words, words[:, 1:] * (judged > 0)], axis=1)
        query, target = known.sides in ("query", "both"), known.sides in ("target", "both")
        images = (query, target, target and judged > 0)
        found.append(_Typical(known.name, rows, words, images, (1, 1, max(judged, 1))))
    if not found:
        raise UserError(f"config.data.sets={data['sets']}: none of them is a set of MMEB")
    return found
