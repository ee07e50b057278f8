"""EfficientNet-Lite0: a small convolutional vision tower.

Source: Tan & Le 2019, "lite" variant: no squeeze-and-excitation, ReLU6, TensorFlow's "SAME"
padding, input (rgb - 127) / 128. Batch norm always uses its running statistics: the tower is
frozen.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from unime_jax.models.config_json import check_numbers
from unime_jax.models.hf import KeyMap, Rule
from unime_jax.models.layers import Linear
from unime_jax.types import Array, UserError

_MOST = 10_000  # of each number of a stage
STRIDE = 32  # pixels per position of the last grid, on either side
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """Sizes; the defaults are Lite0's, others serve tests.

    Attributes:
      image_size: S, a multiple of 32.
      grid: positions per side that are handed on; fewer than S / 32 are averages over areas.
      stem, head: channels of the first and the last convolution.
      stages: (kernel, stride, expansion, channels, blocks) each.
      num_classes: outputs of the ImageNet classifier.
      eps: of the batch norms.
    """

    image_size: int = 224
    grid: int = 7
    stem: int = 32
    head: int = 1280
    stages: tuple[tuple[int, int, int, int, int], ...] = _STAGES
    num_classes: int = 1000
    eps: float = 1e-3

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "EfficientNetConfig":
        """Reads `vision_config`; keys are those of this class, only image_size is required.

        Raises:
          UserError: an unknown key, or sizes that do not fit together.
        """
        config = dict(config)
        model_type = config.pop("model_type", None)
        if model_type != "efficientnet-lite0":
            raise UserError(
                f"vision_config.model_type {model_type!r} is unknown; known: efficientnet-lite0"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(config) - known):
            raise UserError(f"vision_config: unknown keys {', '.join(unknown)}")
        sizes = ("image_size", "grid", "stem", "head", "num_classes")
        check_numbers(config, whole=sizes, real=("eps",), optional=True, where="vision_config.")
        size = config.get("image_size") or 0
        if size < STRIDE or size % STRIDE:
            raise UserError(f"vision_config.image_size = {size!r} is no multiple of {STRIDE}")
        config = {key: value for key, value in config.items() if value is not None}
        config.setdefault("grid", size // STRIDE)
        if not 1 <= config["grid"] <= size // STRIDE:
            raise UserError(
                f"vision_config.grid = {config['grid']} is not between 1 and {size // STRIDE}, "
                f"what an image_size of {size} gives"
            )
        if "stages" in config:
            config["stages"] = _stages(config["stages"])
        return cls(**config)


def _stages(given: Any) -> tuple[tuple[int, int, int, int, int], ...]:
    good = isinstance(given, (list, tuple)) and all(
        isinstance(stage, (list, tuple))
        and len(stage) == 5
        and all(type(number) is int and 0 < number < _MOST for number in stage)
        for stage in given
    )
    if not good or not given:
        raise UserError(
            "vision_config.stages: give five positive whole numbers for each: kernel, stride, "
            "expansion, channels, blocks"
        )
    return tuple(map(tuple, given))


class Conv(nnx.Module):
    """Is a convolution without bias.

    Attributes:
      kernel: [k, k, I, O]; [k, k, 1, O] where depthwise.
    """

    def __init__(self, size, inputs, outputs, *, stride=1, depthwise=False, rngs, dtype):
        shape = (size, size, 1 if depthwise else inputs, outputs)
        init = jax.nn.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), shape, dtype))
        self.stride = stride
        self.depthwise = depthwise

    def __call__(
        self, x: Float[Array, "G h w I"], scale: Float[Array, " O"]
    ) -> Float[Array, "G h2 w2 O"]:
        """Convolves with `kernel * scale`."""
        kernel = self.kernel[...] * scale
        size = kernel.shape[0]
        if size == 1:
            return jnp.einsum("ghwi,io->ghwo", x, kernel[0, 0])
        windows = _windows(x, size, self.stride)
        if self.depthwise:
            # A sum over shifted copies: 10 to 40 times faster than XLA:CPU's grouped convolution.
            terms = (window * kernel[i, j, 0] for (i, j), window in windows.items())
            return functools.reduce(operator.add, terms)
        columns = jnp.concatenate(list(windows.values()), axis=-1)
        return jnp.einsum("ghwi,io->ghwo", columns, kernel.reshape(-1, kernel.shape[-1]))


def _windows(x: Array, size: int, stride: int) -> dict[tuple[int, int], Array]:
    """Returns, for every tap of a kernel, what it sees at each output position ("SAME")."""

    def padding(n):
        outputs = -(-n // stride)
        total = max((outputs - 1) * stride + size - n, 0)
        return outputs, (total // 2, total - total // 2)

    (rows, pad_rows), (columns, pad_columns) = padding(x.shape[1]), padding(x.shape[2])
    x = jnp.pad(x, ((0, 0), pad_rows, pad_columns, (0, 0)))
    return {
        (i, j): x[
            :,
            i : i + (rows - 1) * stride + 1 : stride,
            j : j + (columns - 1) * stride + 1 : stride,
        ]
        for i in range(size)
        for j in range(size)
    }


class BatchNorm(nnx.Module):
    """Is batch norm at its running statistics: a factor and a constant per channel."""

    def __init__(self, width: int, *, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))
        self.mean = nnx.Param(jnp.zeros((width,), dtype))
        self.var = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def factor(self) -> Float[Array, " O"]:
        return self.scale[...] * jax.lax.rsqrt(self.var[...] + self.eps)

    def constant(self) -> Float[Array, " O"]:
        return self.bias[...] - self.mean[...] * self.factor()


def _conv_norm(conv: Conv, norm: BatchNorm, x: Array) -> Array:
    # The factor goes into the kernel, where it costs nothing.
    return conv(x, norm.factor()) + norm.constant()


class Block(nnx.Module):
    """Is the inverted bottleneck: widen, filter each channel, narrow."""

    def __init__(self, size, stride, expand, inputs, outputs, *, eps, rngs, dtype):
        inner = inputs * expand
        self.expand_conv = nnx.data(None)
        self.bn0 = nnx.data(None)
        if expand != 1:
            self.expand_conv = nnx.data(Conv(1, inputs, inner, rngs=rngs, dtype=dtype))
            self.bn0 = nnx.data(BatchNorm(inner, eps=eps, dtype=dtype))
        self.depthwise_conv = Conv(
            size, inner, inner, stride=stride, depthwise=True, rngs=rngs, dtype=dtype
        )
        self.bn1 = BatchNorm(inner, eps=eps, dtype=dtype)
        self.project_conv = Conv(1, inner, outputs, rngs=rngs, dtype=dtype)
        self.bn2 = BatchNorm(outputs, eps=eps, dtype=dtype)
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x: Float[Array, "G h w I"]) -> Float[Array, "G h2 w2 O"]:
        y = x
        if self.expand_conv is not None:
            y = jax.nn.relu6(_conv_norm(self.expand_conv, self.bn0, y))
        y = jax.nn.relu6(_conv_norm(self.depthwise_conv, self.bn1, y))
        y = _conv_norm(self.project_conv, self.bn2, y)
        return x + y if self.residual else y


class EfficientNet(nnx.Module):
    """Turns tiles into a grid of features; f32 always, for it is small and frozen."""

    def __init__(self, config: EfficientNetConfig, *, rngs: nnx.Rngs):
        dtype, eps = jnp.float32, config.eps
        self.config = config
        self.conv_stem = Conv(3, 3, config.stem, stride=2, rngs=rngs, dtype=dtype)
        self.bn0 = BatchNorm(config.stem, eps=eps, dtype=dtype)
        blocks, width = {}, config.stem
        for size, stride, expand, outputs, count in config.stages:
            for n in range(count):
                blocks[str(len(blocks))] = Block(
                    size,
                    stride if n == 0 else 1,
                    expand,
                    width,
                    outputs,
                    eps=eps,
                    rngs=rngs,
                    dtype=dtype,
                )
                width = outputs
        self.blocks = nnx.Dict(blocks)
        self.conv_head = Conv(1, width, config.head, rngs=rngs, dtype=dtype)
        self.bn1 = BatchNorm(config.head, eps=eps, dtype=dtype)
        self.fc = Linear(config.head, config.num_classes, bias=True, rngs=rngs, dtype=dtype)

    def _grid(self, tiles: UInt8[Array | np.ndarray, "N S S 3"]) -> Float[Array, "N h w D"]:
        x = (tiles.astype(jnp.float32) - 127.0) / 128.0
        x = jax.nn.relu6(_conv_norm(self.conv_stem, self.bn0, x))
        for n in range(len(self.blocks)):
            x = self.blocks[str(n)](x)
        return jax.nn.relu6(_conv_norm(self.conv_head, self.bn1, x))

    def __call__(self, tiles: UInt8[Array | np.ndarray, "N S S 3"]) -> Float[Array, "N P D"]:
        """Returns the features of every position, row by row; P = grid^2."""
        return jax.lax.platform_dependent(
            tiles, cpu=lambda tiles: _by_chunks(self._features, tiles), default=self._features
        )

    def _features(self, tiles: UInt8[Array | np.ndarray, "N S S 3"]) -> Float[Array, "N P D"]:
        x = self._grid(tiles)
        rows, columns = (area_weights(n, self.config.grid) for n in x.shape[1:3])
        if x.shape[1:3] != (self.config.grid, self.config.grid):
            x = jnp.einsum("nhwd,ph,qw->npqd", x, rows, columns)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def classify(self, tiles: UInt8[Array | np.ndarray, "N S S 3"]) -> Float[Array, "N V"]:
        """Returns ImageNet logits."""
        return self.fc(self._grid(tiles).mean((1, 2)))


def _by_chunks(function, tiles: Array, size: int = 2) -> Array:
    """Applies a function to a few tiles at a time.

    Activations of 2 tiles stay near a CPU's cache: 2 to 4 times the images per second of 32.
    """
    count = len(tiles)
    if count <= size:
        return function(tiles)
    tiles = jnp.pad(tiles, ((0, -count % size), (0, 0), (0, 0), (0, 0)))
    out = jax.lax.map(function, tiles.reshape(-1, size, *tiles.shape[1:]))
    return out.reshape(-1, *out.shape[2:])[:count]


def area_weights(inputs: int, outputs: int) -> np.ndarray:
    """Returns f32[outputs, inputs]: means over equal areas, which may cut through a position."""
    edges = np.linspace(0, inputs, outputs + 1)
    left, right = edges[:-1, None], edges[1:, None]
    cell = np.arange(inputs)[None]
    overlap = np.minimum(right, cell + 1) - np.maximum(left, cell)
    return (np.maximum(overlap, 0) * outputs / inputs).astype(np.float32)


def key_map(config: EfficientNetConfig, *, hf: str, ours: str) -> KeyMap:
    """Returns the keys under a prefix on either side; they are those of the published .pth."""
    rules = [
        Rule(f"{hf}_fc.weight", f"{ours}fc/kernel", "linear"),
        Rule(f"{hf}_fc.bias", f"{ours}fc/bias"),
    ]

    def conv_norm(hf, ours, conv, norm):
        rules.append(Rule(f"{hf}_{conv}.weight", f"{ours}{conv}/kernel", "conv"))
        names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
        rules.extend(Rule(f"{hf}_{norm}.{a}", f"{ours}{norm}/{b}") for a, b in names.items())

    conv_norm(hf, ours, "conv_stem", "bn0")
    conv_norm(hf, ours, "conv_head", "bn1")
    expands = [expand for _, _, expand, _, count in config.stages for _ in range(count)]
    for n, expand in enumerate(expands):
        parts = [("depthwise_conv", "bn1"), ("project_conv", "bn2")]
        parts += [("expand_conv", "bn0")] * (expand != 1)
        for conv, norm in parts:
            conv_norm(f"{hf}_blocks.{n}.", f"{ours}blocks/{n}/", conv, norm)
    return KeyMap(tuple(rules), ignored=(r".*\.num_batches_tracked",))
