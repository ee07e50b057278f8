"""Speed of the backbones: `python tests/bench/models.py [student directory]`.

Times are processor seconds where the machine is shared, wall seconds beside them; best of a few.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unime_jax import models, runtime
from unime_jax.models import lora
from unime_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from unime_jax.types import Inputs, flatten, unflatten

TARGETS = r"language_model/.*_proj$"


def best(function, *arguments, repeats: int = 5) -> tuple[float, float]:
    """(wall, processor) seconds of a compiled function."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(function(*arguments))
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return min(t[0] for t in times), min(t[1] for t in times)


def report(name: str, count: int, unit: str, times: tuple[float, float]) -> None:
    wall, processor = times
    print(f"{name:34} {wall:7.3f} s ({processor:6.3f} processor s)  {count / wall:8.0f} {unit}/s")


def tower(size: int, count: int) -> None:
    config = EfficientNetConfig(image_size=size, grid=size // 32)
    graphdef, state = nnx.split(EfficientNet(config, rngs=nnx.Rngs(0)))
    tiles = np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    function = jax.jit(lambda state, tiles: nnx.merge(graphdef, state)(tiles))
    report(f"EfficientNet-Lite0 {size} px x {count}", count, "images", best(function, state, tiles))


def training(directory, pattern: str, rows: int, tokens: int) -> None:
    """Gradients of an embedding with respect to the parameters that a substring selects."""
    model = lora.attach(
        models.load(directory), rank=16, alpha=32, dropout=0.0, targets=TARGETS, rngs=nnx.Rngs(0)
    )
    graphdef, state = nnx.split(model)
    flat = flatten(nnx.to_pure_dict(state))
    trainable = {path: x for path, x in flat.items() if pattern in path}
    shape = (rows, tokens)
    inputs = Inputs(
        np.random.default_rng(0).integers(0, 40000, shape).astype(np.int32),
        np.full(rows, tokens, np.int32),
        np.full(shape, -1, np.int32),
        np.zeros((rows, 0, 0, 0, 3), np.uint8),
    )

    def loss(trainable, flat):
        out = nnx.merge(graphdef, unflatten({**flat, **trainable})).embed(inputs)
        return jnp.sum(out[:, 0])

    function = jax.jit(jax.grad(loss) if trainable else loss)
    name = {"lora_": "LoRA step", "layers/": "full step"}.get(pattern, "forward")
    times = best(function, trainable, flat)
    report(f"{name} {rows} x {tokens} tokens", rows * tokens, "tokens", times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = runtime.cache_directory() / "smol" / "student"
    parser.add_argument("directory", nargs="?", default=default)
    directory = parser.parse_args().directory
    for size in (160, 224):
        tower(size, 32)
    for pattern in ("nothing", "lora_", "layers/"):
        training(directory, pattern, 64, 32)


if __name__ == "__main__":
    main()
