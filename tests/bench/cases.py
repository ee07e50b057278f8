"""The training steps that are timed: a model with random weights, adapters and one batch each.

    python tests/bench/cases.py NAME FOLDER MODELS

writes model/ (Hugging Face layout; a link into MODELS, where cases share them), first.npz (what is
trained, at the start), rows.npz (the batch) and case.json (the resolved configuration); both sides
read these alone.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
import zlib
from typing import Any

import numpy as np
import rows as rows_files
from rows import Group, Rows

ROOT = pathlib.Path(__file__).resolve().parents[2]
_CROPS = "data.image_crops"
FREE = 20  # shares of a row that its text may be shorter than the longest, in percent


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows of a batch: (rows, tokens of text, whether there is an image), for each side."""

    query: tuple[tuple[int, int, bool], ...]
    target: tuple[tuple[int, int, bool], ...] = ()
    negative: tuple[tuple[int, int, bool], ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step.

    Attributes:
      title: for the table.
      stage: of the configuration.
      config: content of config.json; None: the newcomer's student, which must have been fetched.
      mixture: of a batch of random rows; None: a batch of the newcomer's data.
      image_size: side of the square that every image is.
      settings: "section.key" -> value, over `base_config()`.
      forward: embed the rows rather than train on them.
      torch: whether PyTorch can do the same.
      one_pass: PyTorch with checkpoints needs no chunks.
    """

    title: str
    stage: str
    config: dict[str, Any] | None
    mixture: Mixture | None
    image_size: int = 0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    forward: bool = False
    torch: bool = True
    one_pass: bool = False


def llava(
    width: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    tower: tuple[int, int, int],
    tile: int,
    vocabulary: int,
) -> dict[str, Any]:
    """Returns config.json of a LLaVA-1.6; `tower` is width, layers, heads."""
    return {
        "model_type": "llava_next",
        "text_config": {
            "model_type": "mistral",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": width // heads[0],
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": tower[0],
            "intermediate_size": 4 * tower[0],
            "num_hidden_layers": tower[1],
            "num_attention_heads": tower[2],
            "image_size": tile,
            "patch_size": 14,
        },
        "image_grid_pinpoints": [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile]],
        "image_token_index": vocabulary - 4,
    }


SMALL = llava(512, 1536, 8, (8, 4), (256, 4, 4), 112, 8192)
LOADED = llava(1024, 2816, 16, (16, 8), (512, 12, 8), 112, 32064)
TINY = llava(64, 128, 2, (4, 2), (32, 3, 2), 28, 264)
# Shares as in MMEB: 3 of 4 queries have an image, and 3 of 8 targets.
MIXED = Mixture(((12, 24, True), (4, 32, False)), ((10, 24, False), (6, 8, True)))
FEW = Mixture(((4, 8, True), (2, 12, False)), ((4, 8, False), (2, 6, True)))
CASES = {
    "stage2_llava": Case(
        "stage 2, LLaVA (8 layers of 512), 16 pairs, chunks of 8",
        "contrast",
        SMALL,
        MIXED,
        112,
        {"train.chunk": 8},
    ),
    "stage2_llava_whole": Case(
        "stage 2, LLaVA, 16 pairs at once", "contrast", SMALL, MIXED, 112, {"train.chunk": 0}
    ),
    "stage2_smol": Case(
        "stage 2, smol (6 layers of 576), 64 pairs, chunks of 32",
        "contrast",
        None,
        None,
        0,
        {
            "train.chunk": 32,
            "train.trainable": (r"^multi_modal_projector/",),
            "train.batch_size": 64,
        },
    ),
    "stage1_smol": Case(
        "stage 1, smol (6 layers of 576), 128 sentences",
        "distill",
        None,
        None,
        0,
        {"train.adapters.rank": 32, "loss.temperature": 0.05, "train.batch_size": 128},
    ),
    "load": Case("", "contrast", LOADED, FEW, 112, {"model.dtype": "bfloat16"}),
    "tiny": Case("stage 2, a tiny LLaVA", "contrast", TINY, FEW, 28, {"train.chunk": 2}),
    "tiny_stage1": Case(
        "stage 1, a tiny LLaVA",
        "distill",
        TINY,
        Mixture(((4, 8, False), (2, 12, False)), ((6, 9, False),)),
        0,
        {"loss.temperature": 0.3, "loss.kl_diagonal": False},
    ),
}


def resolved(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    """Returns the configuration of a case as a run has it."""
    from unime_jax.config import base_config

    c = base_config()
    c.stage = case.stage
    c.output = str(folder / "run")
    c.model.path = str(folder / "model")
    c.model.remat = "dots"  # half of the memory of keeping all
    c.optim.learning_rate = 1e-4
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 0
    for key, value in case.settings.items():
        *parents, name = key.split(".")
        section = c
        for parent in parents:
            section = section[parent]
        section[name] = value
    return c.to_dict()


def prepare(case: Case, folder: pathlib.Path, models: pathlib.Path) -> None:
    """Writes a case; its model into a directory that cases share."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = resolved(case, folder)
    if case.config is None:
        rows, model = _fetched(case, settings)
        (folder / "model").symlink_to(model)
    else:
        _share_model(folder, models, case.config, settings["model"]["dtype"])
        if case.mixture is None:
            import gpu_cases

            case = dataclasses.replace(case, mixture=gpu_cases.mixture(case, settings))
        rows = draw_rows(case, np.random.default_rng(0))
    rows_files.save(folder / "rows.npz", rows)
    np.savez(folder / "first.npz", **_first(settings))
    count, unit = rows.count, "pairs/s"
    if case.forward or rows.vectors is not None:  # those of all sides
        count = sum(map(len, rows.orders.values()))
        unit = "rows/s" if case.forward else "sentences/s"
    settings["case"] = {
        "title": case.title,
        "stage": case.stage,
        "forward": case.forward,
        "torch": case.torch,
        "one_pass": case.one_pass,
        "rows": count,
        "unit": unit,
        "tokens": rows.tokens,
    }
    (folder / "case.json").write_text(json.dumps(settings))


def _share_model(
    folder: pathlib.Path, models: pathlib.Path, config: dict[str, Any], dtype: str
) -> None:
    """Links to a model that other cases have too, written once."""
    content = json.dumps([config, dtype], sort_keys=True, default=str).encode()
    shared = models / f"{zlib.crc32(content):08x}"
    if not shared.is_dir():
        part = shared.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        write_model(part, config, dtype)
        part.rename(shared)
    (folder / "model").symlink_to(shared.resolve())


def write_model(directory: pathlib.Path, config: dict[str, Any], dtype: str) -> None:
    """Writes random weights; one block of numbers, repeated: drawing billions takes minutes."""
    import jax.numpy as jnp

    from unime_jax import models
    from unime_jax.types import flatten, unflatten

    _, abstract = models.abstract(config, dtype=dtype)
    noise = np.random.default_rng(0).standard_normal(1048573, np.float32)  # a prime number of them

    def draw(path, leaf):
        name = path.rpartition("/")[2]
        scale = np.prod(leaf.shape[:-1][-3 if "patch" in path else -1 :]) ** -0.5
        block = noise * scale if name == "kernel" else 0.1 * noise + float(name == "scale")
        block = np.roll(block.astype(jnp.dtype(dtype)), zlib.crc32(path.encode()))
        return np.resize(block, leaf.shape)

    flat = {path: draw(path, leaf) for path, leaf in flatten(abstract).items()}
    models.save(directory, unflatten(flat), config, dtype=dtype)


def draw_rows(case: Case, rng: np.random.Generator) -> Rows:
    """Draws texts of random tokens and images of random pixels, laid out as the model does."""
    from flax import nnx

    from unime_jax import models

    spec = nnx.merge(*models.abstract(case.config)).image_spec
    text = case.config.get("text_config", case.config)
    vocabulary = case.config.get("image_token_index", text["vocab_size"])
    sides = {}
    for side in rows_files.SIDES:
        groups = getattr(case.mixture, side)
        if groups:
            sides[side] = [_group(case, spec, vocabulary, *group, rng) for group in groups]
    orders = {
        side: rng.permutation(sum(len(group.lengths) for group in groups)).astype(np.int32)
        for side, groups in sides.items()
    }
    count = len(orders["query"])
    if case.stage != "distill":
        return Rows(sides, orders, target_ids=np.arange(count, dtype=np.int32))
    vectors = rng.standard_normal((sum(map(len, orders.values())), 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Rows(sides, orders, vectors=vectors)


def _group(case, spec, vocabulary, count, text, image, rng) -> Group:
    from unime_jax.data import preprocess

    before, index, tiles, picture, grid = 1, np.zeros(0, np.int32), 0, None, None
    if image:
        options = {"image_size": case.image_size, "image_crops": case.settings.get(_CROPS, 0)}
        reader = preprocess.Preprocessor("", spec, prompt="", max_tokens=8192, **options)
        layout = reader.fixed_layout
        index, tiles, picture = layout.index, layout.tiles, (case.image_size,) * 2
        if spec.kind == "phi_hd":
            grid = np.tile(np.array(layout.grid, np.int32), (count, 1))
    length = text + len(index)
    lengths = length - rng.integers(0, max(1, text * FREE // 100), count).astype(np.int32)
    tokens = rng.integers(5, vocabulary, (count, length)).astype(np.int32)
    places = np.full((count, length), -1, np.int32)
    places[:, before : before + len(index)] = index
    tokens[places >= 0] = 0
    tokens[np.arange(length) >= lengths[:, None]] = 0
    shape = (count, tiles, spec.size, spec.size, 3)
    pixels = rng.integers(0, 256, shape, np.uint8)
    return Group(tokens, lengths.astype(np.int32), places, pixels, grid=grid, picture=picture)


def _fetched(case: Case, settings: dict[str, Any]) -> tuple[Rows, pathlib.Path]:
    """Takes a batch of the newcomer's data, its images through the frozen tower."""
    from unime_jax import embedder, runtime, train_data

    assets = runtime.cache_directory() / "smol"
    if not (assets / "student" / "config.json").is_file():
        raise SystemExit("needs the small assets: python -m unime_jax.prepare smol")
    settings["model"]["path"] = str(assets / "student")
    data = settings["data"]
    data["path"] = str(assets / "data")
    if case.stage == "distill":
        data |= {"max_tokens": 48, "length_bins": 4}
        settings["teacher"] |= {
            "path": str(assets / "teacher"),
            "vectors": str(assets / "teacher-vectors"),
        }
        settings["loss"]["kl_diagonal"] = False
    else:
        data |= {"max_tokens": 32, "directions": ("image_to_text", "text_to_image")}
    distill = case.stage == "distill"
    model, directory = embedder.load_model(
        assets / "student", dtype="float32", part="language" if distill else "all"
    )
    base = embedder.Embedder(model, directory=directory)
    batch = next(train_data.open_data(settings, base).batches(0))
    sides, orders = {}, {}
    for side in ("query", "target"):
        groups = getattr(batch, side)
        if groups:
            sides[side] = [_with_features(base, group) for group in groups]
            orders[side] = np.asarray(getattr(batch, f"{side}_order"))
    ids = None if batch.target_ids is None else np.asarray(batch.target_ids)
    return Rows(sides, orders, batch.vectors, ids), assets / "student"


def _with_features(base, group) -> Group:
    arrays = (group.tokens, group.lengths, group.image_index)
    if not group.tiles.shape[1]:
        return Group(*map(np.asarray, arrays), np.asarray(group.tiles))
    found = base.featurise(np.asarray(group.tiles).reshape(-1, *group.tiles.shape[2:]))
    found = found.reshape(*group.tiles.shape[:2], *found.shape[1:]).astype(np.float16)
    empty = np.zeros((*group.tiles.shape[:2], 0, 0, 3), np.uint8)
    return Group(*map(np.asarray, arrays), empty, found)


def _first(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns what is trained at the start; no adapter is zero, so that all have gradients.

    A model is read only where weights of its own are trained: seven billion take a minute.
    """
    from flax import nnx

    from unime_jax import embedder, models, optim, train_data
    from unime_jax.planning import abstract
    from unime_jax.types import flatten

    directory = pathlib.Path(settings["model"]["path"])

    def attach(model):
        embedder.attach_adapters(model, settings["train"]["adapters"], seed=0)
        return model

    if settings["train"]["trainable"]:
        part = "all" if train_data.reads_images(settings) else "language"
        model = attach(models.load(directory, dtype=settings["model"]["dtype"], part=part))
    else:
        config = json.loads((directory / "config.json").read_text())
        model = nnx.eval_shape(attach, abstract.model(settings, config, "xla"))
    flat = flatten(nnx.to_pure_dict(nnx.state(model)))
    trainable, _ = optim.split_by_settings(flat, settings["train"])
    rng = np.random.default_rng(1)
    return {
        path: 0.02 * rng.standard_normal(leaf.shape, np.float32)
        if path.endswith(("/lora_A", "/lora_B"))
        else np.asarray(leaf)
        for path, leaf in trainable.items()
    }


def find(name: str) -> Case:
    if name in CASES:
        return CASES[name]
    import gpu_cases

    return gpu_cases.case(name)


if __name__ == "__main__":
    prepare(find(sys.argv[1]), *map(pathlib.Path, sys.argv[2:]))
