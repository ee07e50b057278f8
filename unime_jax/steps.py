"""The training step of every stage."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from unime_jax import chunks, losses, optim, sharding
from unime_jax.models import layers
from unime_jax.models.multimodal import FEATURES
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

    def create(trainable):
        return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))

    if mesh is None:
        return create(trainable)
    placed = state_shardings(jax.eval_shape(create, trainable), mesh)
    trainable = {path: sharding.put(x, placed.trainable[path]) for path, x in trainable.items()}
    return jax.jit(create, out_shardings=placed)(trainable)


def place_batch(
    batch: Batch, mesh, shapes: Mapping[str, Sequence[chunks.Shape]] | None = None
) -> Batch:
    """Puts a batch on the mesh, its groups merged and their rows split over data x fsdp.

    A group whose rows do not divide gets copies of its last one, which nobody asks for: orders name
    the same rows as before. Whatever is no group is small and goes to every device.

    Args:
      batch: the whole, or with `shapes` groups of this process's rows alone (`sharding.own_rows`).
      mesh: of the devices.
      shapes: of the whole groups of each side (see `chunks.merge`).
    """
    devices = sharding.batch_devices(mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, BATCH)
    batch, counts = chunks.merge(batch, shapes)
    rows = np.array(counts, int)
    padded = -(-rows // devices) * devices
    shift = np.cumsum(padded) - padded - (np.cumsum(rows) - rows)
    orders = {}
    for side in chunks.SIDES:
        order = getattr(batch, f"{side}_order")
        if order is not None and (rows != padded).any():
            group_of = np.searchsorted(np.cumsum(rows), order, side="right")
            orders[f"{side}_order"] = (order + shift[group_of]).astype(np.int32)
    if shapes is None:
        groups = sharding.put(tuple(map(_pad_rows, batch.query, (padded - rows).tolist())), split)
    else:
        groups = tuple(
            jax.tree.map(lambda x, count=count: sharding.put_own(x, count, mesh), group)
            for group, count in zip(batch.query, counts, strict=True)
        )
    rest = sharding.put(dataclasses.replace(batch, **orders, query=()), everywhere)
    return dataclasses.replace(rest, query=groups)


def _pad_rows(group: Inputs, extra: int) -> Inputs:
    if not extra:
        return group
    return jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], extra, axis=0)]), group)


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
    mask_equal_targets: bool = True,
    set_names: Sequence[str] = (),
) -> Objective:
    """Returns the loss of a stage on embeddings: distill, align, contrast or judge."""

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
            target_ids=batch.target_ids if mask_equal_targets else None,
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
            target_ids=batch.target_ids if mask_equal_targets else None,
            key=key,
            sets=batch.sets if set_names else None,
            set_names=tuple(set_names),
        )

    def judged(sides, batch, key):
        del key
        query, target, own = sides
        own = own.reshape(query.shape[0], -1, query.shape[1])
        return losses.judged_kl(query, target, own, batch.scores, temperature=temperature)

    if stage in ("distill", "judge"):
        return distill if stage == "distill" else judged
    return hard_negatives if stage == "contrast" and k else in_batch


def loss_and_gradients(
    graphdef, objective: Objective, *, chunk: int = 0, dropout: bool = False, mesh=None
):
    """Returns `(trainable, frozen, batch, key) -> ((loss, metrics), gradients)`, to be jitted."""
    placement = layers.Placement()
    if mesh is not None and mesh.size > 1:
        placement = layers.Placement(
            lambda x: sharding.constrain_rows(x, mesh, 0),
            functools.partial(sharding.gathered, mesh=mesh),
            functools.partial(sharding.per_device, mesh=mesh),
        )

    def loss_fn(trainable, frozen, batch, key):
        flat = {**frozen, **trainable}
        if placement.weights is not None:  # stacked layers gather theirs one by one
            flat = {p: x if "/layers/" in p else placement.weights(p, x) for p, x in flat.items()}
        in_layers = frozenset(p.partition("/layers/")[2] for p in trainable if "/layers/" in p)
        placed = dataclasses.replace(placement, trainable=in_layers)
        params = unflatten(flat)

        def encode(inputs, key):
            with layers.placed(placed):
                return nnx.merge(graphdef, params).embed(inputs, key=key)

        # A frozen tower's features are kept: it runs once a step.
        tower_trains = any(path.startswith("vision_tower/") for path in trainable)
        encode_key, loss_key = jax.random.split(key)
        batch, _ = chunks.merge(batch)
        rows = chunks.encode_groups(
            encode,
            batch.query,
            chunk=chunk,
            key=encode_key if dropout else None,
            mesh=mesh,
            keep=() if tower_trains else (FEATURES,),
        )
        orders = (getattr(batch, f"{side}_order") for side in chunks.SIDES)
        sides = [rows[order] for order in orders if order is not None]
        with jax.named_scope("loss"):  # for profiles and `plan`
            return objective(sides, batch, loss_key)

    return jax.value_and_grad(loss_fn, has_aux=True)


def step_key(seed: int, step: Array) -> Array:
    """Returns the key of all that is random in a step."""
    return jax.random.fold_in(jax.random.key(seed), step)


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

    grad_fn = loss_and_gradients(graphdef, objective, chunk=chunk, dropout=dropout, mesh=mesh)
    optimizer = optax.with_extra_args_support(optimizer)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, frozen, batch: Batch):
        key = step_key(seed, state.step)
        (loss, metrics), grads = grad_fn(state.trainable, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, loss=loss)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            **metrics,
            "gradient_norm": optim.global_norm(grads),
            "learning_rate": schedule(state.step),
        }
        before = optim.skipped_updates(state.opt_state)
        if before is not None:  # the schedule goes by the updates that were made
            metrics["learning_rate"] = schedule(state.step - before)
            metrics["skipped_updates"] = optim.skipped_updates(opt_state)
        state = TrainState(state.step + 1, trainable, opt_state)
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))
        return state, metrics

    return train_step


def from_settings(
    settings: Mapping[str, Any], graphdef, *, steps: int, sets: Sequence[str] = (), mesh=None
) -> tuple[optax.GradientTransformation, Callable[..., tuple[TrainState, dict[str, Array]]]]:
    """Returns the optimiser and the training step of a configuration.

    Args:
      settings: the resolved configuration.
      graphdef: of the model with its adapters.
      steps: of the whole run.
      sets: names of the data sets.
      mesh: of the devices.
    """
    optimizer, schedule = optim.from_settings(settings["optim"], steps=steps)
    step = make_train_step(
        graphdef,
        make_objective(settings["stage"], **settings["loss"], set_names=sets),
        optimizer,
        schedule=schedule,
        seed=settings["seed"],
        chunk=settings["train"]["chunk"],
        dropout=drops(settings),
        mesh=mesh,
    )
    return optimizer, step


def drawn_by_groups(settings: Mapping[str, Any]) -> str:
    """Names what a step draws by keys that depend on how its rows are grouped, "" if nothing is."""
    loss = settings["loss"]
    draws = settings["stage"] == "contrast" and loss["k"] and loss["negatives"] == "random"
    found = ["dropout masks"] * drops(settings) + ["random negatives"] * bool(draws)
    return " and ".join(found)


def drops(settings: Mapping[str, Any]) -> bool:
    """Says whether a configuration has dropout."""
    train, adapters = settings["train"], settings["train"]["adapters"]
    return train["feature_dropout"] > 0 or (adapters["rank"] > 0 and adapters["dropout"] > 0)
