"""The training step of every stage, and chunked encoding.

Encoding a batch chunk by chunk under `jax.checkpoint` keeps only embeddings alive between the
forward and the backward pass: gradient caching (Gao et al. 2021), with gradients that are those
of the full batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from unime_jax import losses, optim
from unime_jax.sharding import BATCH, state_shardings
from unime_jax.types import Array, Batch, Inputs, unflatten

# (encoded sides of the batch, each f32[B, E]: query, target, negative; batch, key)
# -> (loss, metrics)
Objective = Callable[[Sequence[Array], Batch, Array], tuple[Array, dict[str, Array]]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trainable", "opt_state"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes and a checkpoint holds.

    Attributes:
      step: int32[], steps done.
      trainable: path -> parameter.
      opt_state: the optimiser's.
    """

    step: Any
    trainable: dict[str, Any]
    opt_state: Any


def create_state(trainable: dict[str, Array], optimizer, *, mesh=None) -> TrainState:
    """Returns the state of step 0, where steps leave it: placed anew, they would compile twice."""
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    return state if mesh is None else jax.device_put(state, state_shardings(state, mesh))


def encode_chunked(encode, inputs: Inputs, *, chunk: int, key=None, mesh=None) -> Array:
    """Applies `encode` to a group, at most `chunk` rows at a time, recomputed on the way back.

    The group is split by stride, so that rows stay on their devices. Rows are padded up to equal
    chunks and dropped again: chunking never changes an embedding.

    Args:
      encode: (inputs, key) -> f32[rows, E].
      inputs: a group of G rows.
      chunk: rows per chunk; 0 or at least G encodes the group at once, without recomputation.
      key: for dropout, or None.
      mesh: with several devices, chunks hold a multiple of their number.

    Returns:
      f32[G, E].
    """
    rows = inputs.rows
    if chunk == 0 or chunk >= rows:
        return encode(inputs, key)
    devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    count = -(-rows // chunk)
    size = -(-rows // (count * devices)) * devices

    def split(x):
        x = jnp.pad(x, [(0, count * size - rows)] + [(0, 0)] * (x.ndim - 1), mode="edge")
        x = x.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)
        if devices > 1:
            spec = jax.sharding.PartitionSpec(None, *BATCH)
            x = jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))
        return x

    @jax.checkpoint
    def one(part):
        number, x = part
        return encode(x, None if key is None else jax.random.fold_in(key, number))

    out = jax.lax.map(one, (jnp.arange(count), jax.tree.map(split, inputs)))
    return out.swapaxes(0, 1).reshape(count * size, -1)[:rows]


def encode_groups(
    encode, groups: Sequence[Inputs], *, order=None, chunk: int = 0, key=None, mesh=None
) -> Array:
    """Encodes groups and returns their rows as f32[B, E], permuted by `order` if given."""
    parts = []
    for number, group in enumerate(groups):
        group_key = None if key is None else jax.random.fold_in(key, number)
        parts.append(encode_chunked(encode, group, chunk=chunk, key=group_key, mesh=mesh))
    rows = jnp.concatenate(parts)
    return rows if order is None else rows[order]


def make_objective(
    stage: str,
    *,
    temperature: float,
    kl_direction: str = "teacher_to_student",
    kl_diagonal: bool = True,
    k: int = 8,
    margin: float = 0.1,
    shortage: str = "duplicate",
    negatives: str = "hard",
) -> Objective:
    """Returns the loss of a stage on embeddings: distill, align or contrast."""

    def distill(sides, batch, key):
        del key
        return losses.distill_kl(
            jnp.concatenate(sides),
            batch.vectors,
            temperature=temperature,
            direction=kl_direction,
            diagonal=kl_diagonal,
        )

    def in_batch(sides, batch, key):
        del key
        query, *others = sides
        return losses.info_nce(
            query,
            others[0] if others else batch.vectors,
            temperature=temperature,
            target_ids=batch.target_ids,
            negatives=others[1] if len(others) > 1 else None,
            negative_ids=batch.negative_ids,
        )

    def hard_negatives(sides, batch, key):
        query, target = sides
        return losses.hard_negative_info_nce(
            query,
            target,
            temperature=temperature,
            k=k,
            margin=margin,
            shortage=shortage,
            negatives=negatives,
            target_ids=batch.target_ids,
            key=key,
        )

    if stage == "distill":
        return distill
    return hard_negatives if stage == "contrast" and k else in_batch


def make_train_step(
    graphdef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule,
    seed: int,
    chunk: int = 0,
    dropout: bool = False,
    mesh=None,
):
    """Returns the jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated.

    Gradients exist for the trainable leaves alone. Randomness is a function of (seed, step).
    """

    def loss_fn(trainable, frozen, batch, key):
        params = unflatten({**frozen, **trainable})

        def encode(inputs, key):
            return nnx.merge(graphdef, params).embed(inputs, key=key)

        query_key, target_key, loss_key, negative_key = jax.random.split(key, 4)
        sides = [
            encode_groups(
                encode,
                groups,
                order=order,
                chunk=chunk,
                key=side_key if dropout else None,
                mesh=mesh,
            )
            for groups, order, side_key in (
                (batch.query, batch.query_order, query_key),
                (batch.target, batch.target_order, target_key),
                (batch.negative, batch.negative_order, negative_key),
            )
            if groups
        ]
        return objective(sides, batch, loss_key)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, frozen, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, metrics), grads = grad_fn(state.trainable, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            **metrics,
            "gradient_norm": optim.global_norm(grads),
            "learning_rate": schedule(state.step),
        }
        state = TrainState(state.step + 1, trainable, opt_state)
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))
        return state, metrics

    return train_step
