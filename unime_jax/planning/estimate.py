"""Estimates of a step's time and memory, fast enough to compare many settings.

Probes, steps of the longest group of one device alone with one row, with some and with twice as
many, say what a row takes and what is computed again; everything else of a step is in proportion.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unime_jax.planning import abstract, flops, liveness, memory, pieces
from unime_jax.planning.composition import Composition
from unime_jax.planning.topology import GIB, Chip, Topology
from unime_jax.types import flatten

REMATS = ("none", "dots", "full")
_POSITIONS = 4096  # of a probe: their activations take more than the floats of a layer's weights


@dataclasses.dataclass(frozen=True)
class Probe:
    """What rows of the longest group take.

    Attributes:
      least: bytes of temporaries of one row: at least the floats of a layer's weights.
      rows: so many need `some` bytes, where each more needs `row`.
      again: operations computed again, as a share of those that the mathematics needs.
    """

    least: float
    rows: int
    some: float
    row: float
    again: float

    def temporaries(self, rows: int | float) -> float:
        """Returns the bytes of temporaries of rows that are encoded at a time."""
        return max(self.least, self.some + (rows - self.rows) * self.row)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A chunk and a remat, and what they are estimated to cost.

    Attributes:
      chunk, remat: of the configuration.
      flops: of a step, all devices.
      seconds: of a step.
      peak: bytes on a device.
      fits: whether the peak leaves the margin free.
    """

    chunk: int
    remat: str
    flops: float
    seconds: float
    peak: float
    fits: bool


def margin(chip: Chip) -> float:
    """Returns bytes to leave free beside what a compiler counts.

    On GPUs for the workspaces of cuBLAS and cuDNN, NCCL's buffers and fragmentation, which it does
    not count; on TPUs it counts all that a program has.
    """
    return 0.1 * chip.memory + 2 * GIB if chip.platform == "gpu" else 0.05 * chip.memory


def margin_words(chip: Chip) -> str:
    return "10 % + 2 GiB" if chip.platform == "gpu" else "5 %"


class Estimator:
    """Estimates the settings of one configuration on one topology.

    Args:
      settings: the resolved configuration.
      config: content of config.json.
      composition: of a batch.
      arguments: bytes of the step's arguments on a device.
      model_flops: operations of a step, nothing counted twice.
      topology, mesh: of the devices.
      mfu: share of the peak rate that products run at.
      flash: whether attention never holds the scores of all pairs of positions.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        config: dict[str, Any],
        composition: Composition,
        arguments: memory.Arguments,
        model_flops: float,
        *,
        topology: Topology,
        mesh,
        mfu: float,
        flash: bool,
    ):
        self._settings, self._config, self._composition = settings, config, composition
        self._arguments, self._model_flops = arguments, model_flops
        self._topology, self._mfu, self._flash = topology, mfu, flash
        self._devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self._tensor = mesh.shape["tensor"]
        self.probe = functools.cache(self._probe)

    @property
    def limit(self) -> float:
        """Bytes that a step may take, with the next batch on its way to the device."""
        chip = self._topology.chip
        return chip.memory - margin(chip) - self._arguments.batch

    @property
    def rate(self) -> float:
        """Peak FLOP/s of a device in the dtype of the computation."""
        return self._topology.chip.rate(self._settings["model"]["dtype"])

    def setting(self, chunk: int, remat: str, *, exact: float | None = None) -> Setting:
        """Estimates one setting; `exact` are its operations where they have been counted."""
        probe = self.probe(remat, chunk > 0)
        operations = self._model_flops * (1 + probe.again) if exact is None else exact
        rows = self.rows_alive(chunk)
        kept = self._features + self._arguments.batch if chunk else 0.0
        peak = self._arguments.total + probe.temporaries(rows) + kept
        seconds = self.compute_seconds(operations) + self.weight_seconds(chunk, remat)
        return Setting(chunk, remat, operations, seconds, peak, peak <= self.limit)

    def compute_seconds(self, operations: float) -> float:
        """Returns how long products take at the assumed share of the peak rate."""
        return operations / self._topology.devices / (self.rate * self._mfu)

    def weight_seconds(self, chunk: int, remat: str) -> float:
        """Returns how long it takes to make floats of the codes of quantised weights."""
        kind = self._settings["train"]["quantize"]
        if kind is None:
            return 0.0
        passes = 2 + (chunk > 0) + (remat == "full")
        codes = 0.5 if kind == "nf4" else 1.0
        traffic = self._quantised * (codes + 2.0) / self._tensor
        return self._chunks(chunk) * passes * traffic / self._topology.chip.bandwidth

    def chunks(self) -> list[int]:
        """Returns the values of config.train.chunk that are worth a try: rows of all devices.

        They divide the batch, as the configuration demands; of those that give a device the same
        number of rows the largest, and the configured one always.
        """
        train = self._settings["train"]
        largest = max(rows for rows, _, _ in self._composition.encoded())
        batch = train["batch_size"]
        found = {
            max(1, chunk // self._devices): chunk
            for chunk in range(1, min(largest, batch + 1))
            if batch % chunk == 0
        }
        return [*sorted({*found.values(), train["chunk"]} - {0}), 0]

    # ---- what a step is made of

    @functools.cached_property
    def _groups(self) -> list[tuple[int, int, int]]:
        """Lists what is encoded as one: rows of a device, T and C."""
        found = self._composition.encoded(self._devices)
        return [(rows // self._devices, tokens, tiles) for rows, tokens, tiles in found]

    def _size(self, chunk: int, share: int, tokens: int) -> int:
        """Counts the rows of a group that are encoded at a time, as `chunks.encode_groups` does."""
        longest = self._longest[1]
        return max(1, chunk * longest // tokens // self._devices) if chunk else share

    def _chunks(self, chunk: int) -> int:
        """Counts the passes over the layers."""
        return sum(
            -(-share // self._size(chunk, share, tokens)) for share, tokens, _ in self._groups
        )

    def rows_alive(self, chunk: int) -> float:
        """Returns how many rows of the longest group one device has in work at a time.

        Groups that are encoded at once are held together, from the way there to the way back;
        those in chunks come before and after them, a chunk at a time.
        """
        at_once, in_chunks = 0, 0
        for share, tokens, _ in self._groups:
            size = self._size(chunk, share, tokens)
            if size < share:
                in_chunks = max(in_chunks, size * tokens)
            else:
                at_once += share * tokens
        return max(at_once, in_chunks) / self._longest[1]

    @functools.cached_property
    def _longest(self) -> tuple[int, int, int]:
        return max(self._groups, key=lambda group: group[1])

    @functools.cached_property
    def _model(self) -> nnx.Module:
        return abstract.model(self._settings, self._config, "xla")

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self._model.embedding_width

    @functools.cached_property
    def _quantised(self) -> float:
        """Weights that are held as codes."""
        flat = flatten(nnx.to_pure_dict(nnx.state(self._model)))
        return float(sum(x.size for path, x in flat.items() if path.endswith("/kernel_codes")))

    @functools.cached_property
    def _features(self) -> float:
        """Bytes of the frozen tower's features, which chunks keep for the way back."""
        train = self._settings["train"]
        trained = train["adapters"]["vision"] or any("vision" in p for p in train["trainable"])
        spec = self._model.image_spec
        if spec is None or trained or self._composition.features:
            return 0.0
        tiles = sum(share * tiles for share, _, tiles in self._groups)
        shape = jax.ShapeDtypeStruct((1, spec.size, spec.size, 3), jnp.uint8)
        found = nnx.eval_shape(lambda model, x: model.featurise(x), self._model, shape)
        return tiles * memory.size(found)

    def _probe(self, remat: str, chunked: bool) -> Probe:
        least, again = self._trace(remat, 1, chunked)
        # Short rows must be many for the peak to stand where their activations are.
        rows = max(1, _POSITIONS // self._longest[1])
        some = least if rows == 1 else self._trace(remat, rows, chunked)[0]
        twice, _ = self._trace(remat, 2 * rows, chunked)
        return Probe(least, rows, some, max(twice - some, 0.0) / rows, again)

    def _trace(self, remat: str, rows: int, chunked: bool) -> tuple[float, float]:
        """Returns temporaries and the share computed again of a step of one group."""
        _, tokens, tiles = self._longest
        group = rows * (2 if chunked else 1), tokens, tiles
        piece = pieces.Piece(group, rows if chunked else 0)
        settings = {**self._settings, "model": {**self._settings["model"], "remat": remat}}
        settings, made = pieces.alone(piece, settings, self._composition, self.width)
        run = abstract.run(settings, self._config, made)
        jaxpr, _ = flops.trace(run.step, *run.arguments)
        counted = flops.count_jaxpr(jaxpr)
        if not self._flash:
            jaxpr, _ = flops.trace(run.step, *run.arguments, whole=False)
        return (
            liveness.peak(jaxpr, flash=self._flash),
            sum(counted.again.values()) / counted.model,
        )
