"""A tiny LLaVA-1.6 and batches of it: two groups of images and one of texts on the query side."""

import functools

import jax
import numpy as np
import parity
from flax import nnx

from unime_jax import embedder, optim, sharding, steps
from unime_jax.types import Batch, Inputs, flatten

SIZE, WIDTH = 28, 64
CONFIG = {
    "model_type": "llava_next",
    "text_config": {
        **parity.TEXT,
        "model_type": "mistral",
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 96,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 14,
    },
    "image_grid_pinpoints": [[28, 56], [56, 28]],
    "image_token_index": 90,
}
ADAPTERS = {
    "rank": 4,
    "alpha": 16.0,
    "dropout": 0.1,
    "targets": r"language_model/.*(q|k|v|o|gate|up|down)_proj$",
    "vision": False,
}
TILES, POSITIONS = 2, 9  # a base tile and one more of 2 x 2 features, and a newline


def group(rows: int, tokens: int, *, image: bool, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    shortest = POSITIONS + 2 if image else 1
    lengths = rng.integers(shortest, tokens + 1, rows).astype(np.int32)
    ids = rng.integers(1, 90, (rows, tokens)).astype(np.int32)
    index = np.full((rows, tokens), -1, np.int32)
    tiles = np.zeros((rows, 0, SIZE, SIZE, 3), np.uint8)
    if image:
        index[:, 1 : 1 + POSITIONS] = [1, 2, 3, 4, 5, 6, 7, 8, 0]
        tiles = rng.integers(0, 256, (rows, TILES, SIZE, SIZE, 3)).astype(np.uint8)
    ids = np.where((index >= 0) | (np.arange(tokens) >= lengths[:, None]), 0, ids)
    return Inputs(ids, lengths, index, tiles)


def batch(rows: int = 24, *, seed: int = 0, negatives: int = 0) -> Batch:
    """Groups of sizes that divide over nothing in particular, in permuted order."""
    rng = np.random.default_rng(seed)
    third = rows // 3 - 1
    query = (
        group(third, 4, image=False, seed=seed + 1),
        group(third, 14, image=True, seed=seed + 2),
        group(rows - 2 * third, 18, image=True, seed=seed + 3),
    )
    target = (
        group(rows - third, 6, image=False, seed=seed + 4),
        group(third, 13, image=True, seed=seed + 5),
    )
    more = {}
    if negatives:
        count = rows * negatives
        more = {
            "negative": (group(count, 5, image=False, seed=seed + 6),),
            "negative_order": rng.permutation(count).astype(np.int32),
            "scores": rng.uniform(0, 1, (rows, negatives + 1)).astype(np.float32),
        }
    return Batch(
        query,
        target,
        rng.permutation(rows).astype(np.int32),
        rng.permutation(rows).astype(np.int32),
        target_ids=(np.arange(rows) % (rows - 2)).astype(np.int32),
        sets=(np.arange(rows) % 3).astype(np.int32),
        **more,
    )


def small_batch(rows: int = 16) -> Batch:
    """A group of images on one side, of texts on the other: little to compile."""
    order = np.random.default_rng(0).permutation(rows).astype(np.int32)
    query, target = group(rows, 12, image=True, seed=1), group(rows, 5, image=False, seed=2)
    return Batch((query,), (target,), order, order[::-1].copy())


@functools.cache
def model(vision: bool = False):
    """Returns graphdef, adapters and frozen parameters."""
    built = parity.build(CONFIG)
    embedder.attach_adapters(built, {**ADAPTERS, "vision": vision}, seed=0)
    graphdef, state = nnx.split(built)
    trainable, frozen = optim.split_trainable(
        flatten(nnx.to_pure_dict(state)), [optim.ADAPTER_PATTERN]
    )
    rng = np.random.default_rng(1)
    trainable = {  # lora_B starts at zero: A would get no gradient
        path: np.asarray(x)
        if path.endswith("A")
        else 0.3 * rng.standard_normal(x.shape, np.float32)
        for path, x in trainable.items()
    }
    return graphdef, trainable, frozen


def parts(objective=None, *, mesh=None, vision=False, learning_rate=1e-2, **options):
    """Returns what a run has before its first step: state, frozen parameters and the step."""
    import optax

    graphdef, trainable, frozen = model(vision)
    if objective is None:
        objective = steps.make_objective("contrast", temperature=0.1, k=4)
    schedule = optax.constant_schedule(learning_rate)
    optimizer = optim.make_optimizer(schedule)
    if mesh is not None:
        place = sharding.sharding_of(mesh)
        frozen = {path: jax.device_put(x, place(path, x.shape)) for path, x in frozen.items()}
    state = steps.create_state(jax.tree.map(jax.numpy.array, trainable), optimizer)
    if mesh is not None:
        state = steps.create_state(state.trainable, optimizer, mesh=mesh)
    step = steps.make_train_step(
        graphdef, objective, optimizer, schedule=schedule, seed=0, mesh=mesh, **options
    )
    return state, frozen, step
