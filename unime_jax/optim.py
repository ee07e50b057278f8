"""What is trained, and how: path selection, learning rates, the optimiser, a guard on its steps."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unime_jax.types import Array, UserError

ADAPTER_PATTERN = r"/lora_[AB]$"


def split_trainable(
    flat: Mapping[str, Any], patterns: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters into (trainable, frozen): those that match any regex, and the rest.

    Raises:
      UserError: a pattern matches nothing, or a quantised weight.
    """
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in flat):
            some = ", ".join(sorted(flat)[:4])
            raise UserError(
                f"config.train.trainable: no parameter matches {pattern!r}; paths look like {some}"
            )
    trainable = {p: x for p, x in flat.items() if any(re.search(q, p) for q in patterns)}
    codes = [path for path in trainable if path.endswith(("/kernel_codes", "/kernel_scales"))]
    if codes:
        raise UserError(
            f"config.train.trainable: {codes[0]} is quantized and cannot be trained; leave it to "
            "the adapters or set config.train.quantize=None"
        )
    return trainable, {p: x for p, x in flat.items() if p not in trainable}


def split_by_settings(
    flat: Mapping[str, Any], train: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters as `config.train` says: the adapters and what it names are trained."""
    patterns = [*train["trainable"], *([ADAPTER_PATTERN] if train["adapters"]["rank"] else [])]
    return split_trainable(flat, patterns)


def from_settings(
    settings: Mapping[str, Any], *, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimiser and the learning rate that `config.optim` describes."""
    schedule = learning_rate_schedule(
        peak=settings["learning_rate"],
        kind=settings["schedule"],
        warmup_steps=round(settings["warmup_share"] * steps) or settings["warmup_steps"],
        steps=steps,
    )
    optimizer = make_optimizer(
        schedule,
        b1=settings["b1"],
        b2=settings["b2"],
        weight_decay=settings["weight_decay"],
        clip_norm=settings["clip_norm"],
        multipliers=settings["multipliers"],
    )
    if settings["spike_factor"]:
        optimizer = skip_spikes(
            optimizer, factor=settings["spike_factor"], window=settings["spike_window"]
        )
    return optimizer, schedule


def learning_rate_schedule(
    *, peak: float, kind: str, warmup_steps: int, steps: int
) -> optax.Schedule:
    """Returns linear warm-up from 0 to the peak, then linear or cosine decay to 0, or constant."""
    decay_steps = max(steps - warmup_steps, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[kind]
    if not warmup_steps:
        return after
    # Step 0 already moves: 1 / warmup of the peak rather than 0.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    multipliers: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
    """Returns AdamW on a flat dict of parameters.

    Args:
      schedule: step -> learning rate.
      clip_norm: largest global norm of the gradient; 0 switches clipping off.
      multipliers: (regex on paths, factor on the learning rate); the first match counts.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(b1=b1, b2=b2),
        # Vectors (norms, biases) are not decayed, stacked ones (an axis of layers) neither.
        optax.add_decayed_weights(weight_decay, mask=_is_matrix),
        optax.stateless(lambda updates, _: _scale(updates, multipliers)),
        optax.scale_by_learning_rate(schedule),
    )


class SpikeState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      losses: f32[window], the last ones, infinite where there were none yet.
      skipped: int32[], updates skipped so far.
      inner: the optimiser's.
    """

    losses: Array
    skipped: Array
    inner: Any


def skip_spikes(
    optimizer: optax.GradientTransformation, *, factor: float, window: int
) -> optax.GradientTransformationExtraArgs:
    """Skips updates at losses above `factor` times the median of the last `window`.

    A skipped update changes neither parameters nor the optimiser's state. Its loss counts for the
    median, so that a loss that stays higher is soon accepted. `update` takes the keyword `loss`.
    """

    def init(params):
        losses = jnp.full(window, jnp.inf, jnp.float32)
        return SpikeState(losses, jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(grads, state, params=None, *, loss, **extra):
        del extra
        full = jnp.isfinite(state.losses[0])
        median = jnp.median(state.losses)
        # Above a median of 0 every loss would be one.
        spike = full & (median > 0) & (loss > factor * median)
        updates, inner = optimizer.update(grads, state.inner, params)
        updates = jax.tree.map(lambda x: jnp.where(spike, jnp.zeros_like(x), x), updates)
        inner = jax.tree.map(lambda old, new: jnp.where(spike, old, new), state.inner, inner)
        losses = jnp.append(state.losses[1:], loss.astype(jnp.float32))
        return updates, SpikeState(losses, state.skipped + spike, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def skipped_updates(opt_state: Any) -> Array | None:
    """Returns how many updates `skip_spikes` has skipped; None where nothing is."""
    return opt_state.skipped if isinstance(opt_state, SpikeState) else None


def _is_matrix(flat: Mapping[str, Array]) -> dict[str, bool]:
    return {p: bool(re.search(r"(kernel|embedding|lora_[AB])$", p)) for p in flat}


def _scale(updates, multipliers):
    def factor(path):
        return next((f for pattern, f in multipliers if re.search(pattern, path)), 1.0)

    return {path: update * factor(path) for path, update in updates.items()}


def global_norm(tree) -> Array:
    """Returns the l2 norm over all leaves, f32."""
    leaves = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(leaves, jnp.zeros((), jnp.float32)))
