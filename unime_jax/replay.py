"""One step of a run again: which rows and parameters a loss or gradient comes from.

A run whose loss is not finite names the command. Nothing is written into the run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unime_jax import checkpoint, optim, steps
from unime_jax.train_data import TrainData
from unime_jax.types import Array, Batch, UserError

SIDES = ("query", "target", "negative")
_SHOWN = 5  # rows or parameters named


def run(
    settings: Mapping[str, Any],
    graphdef,
    train_step,
    frozen: Mapping[str, Array],
    data: TrainData,
    state: steps.TrainState,
    mesh,
) -> dict[str, float]:
    """Takes step `config.train.replay`, prints what it finds and returns loss and gradient norm.

    Args:
      settings: the resolved configuration.
      graphdef: of the model with its adapters.
      train_step: see `steps.make_train_step`.
      frozen: parameters that no step changes.
      data: batches by step.
      state: of step 0.
      mesh: devices.

    Raises:
      UserError: the run has no such step.
    """
    number = settings["train"]["replay"]
    if number > data.steps:
        raise UserError(f"config.train.replay={number}: the run has {data.steps} steps")
    restored = checkpoint.read_state(settings["output"], state, before=number)
    state = state if restored is None else restored
    first = int(state.step)
    print(f"replaying step {number} from the state after step {first}", flush=True)
    for step, batch in enumerate(data.batches(first), first):
        placed = steps.place_batch(batch, mesh, data.shared)
        if step == number - 1:
            break
        state, _ = train_step(state, frozen, placed)
    objective = steps.make_objective(settings["stage"], **settings["loss"], set_names=data.sets)
    options = {"chunk": settings["train"]["chunk"], "mesh": mesh}
    look = _watched(graphdef, objective, dropout=steps.drops(settings), **options)
    key = steps.step_key(settings["seed"], state.step)
    found = jax.device_get(look(state.trainable, frozen, placed, key))
    names = data.rows_of(number - 1)
    lines = [f"step {number}: loss {found['loss']}, gradient norm {found['norm']}"]
    lines += _of_rows(found, batch, names)
    lines += _of_parameters(found["parameters"])
    alone = data.shared is None  # else this process has some of the rows
    if alone and not np.isfinite(found["norm"]) and not any(map(len, _bad_rows(found).values())):
        alone = _watched(graphdef, _pull, dropout=False, chunk=0, mesh=mesh)
        lines += _alone(alone, state.trainable, frozen, batch, found, names, mesh)
    print("\n".join(lines), flush=True)
    return {"loss": float(found["loss"]), "gradient_norm": float(found["norm"])}


def _watched(graphdef, objective: steps.Objective, **options):
    """Returns the jitted loss and gradients of `objective`, with what they are made of.

    The result has the loss, the norms of all gradients together and of each parameter's, and by
    side the embeddings and the loss's gradients with respect to them, f32[rows, E].
    """

    def watched(sides: Sequence[Array], batch: Batch, key: Array):
        loss, _ = objective(sides, batch, key)
        pulls = jax.grad(lambda sides: objective(sides, batch, key)[0])(sides)
        return loss, {"sides": list(sides), "pulls": list(pulls)}

    function = steps.loss_and_gradients(graphdef, watched, **options)

    @jax.jit
    def look(trainable, frozen, batch: Batch, key: Array):
        (loss, watched), grads = function(trainable, frozen, batch, key)
        norms = {path: optim.global_norm(x) for path, x in grads.items()}
        return {**watched, "loss": loss, "norm": optim.global_norm(grads), "parameters": norms}

    return look


def _pull(sides: Sequence[Array], batch: Batch, key: Array):
    """Is an objective whose gradient with respect to the query is `batch.vectors`."""
    del key
    return jnp.sum(sides[0] * batch.vectors), {}


def _bad_rows(found: Mapping[str, Any]) -> dict[tuple[str, str], np.ndarray]:
    """Returns the rows that are not finite, by what is not and by side."""
    return {
        (kind, side): np.flatnonzero(~np.isfinite(values).all(axis=1))
        for kind in ("sides", "pulls")
        for side, values in zip(SIDES, found[kind], strict=False)
    }


def _of_rows(found: Mapping[str, Any], batch: Batch, names: Sequence[dict]) -> list[str]:
    lines = []
    told = {"sides": "embedding", "pulls": "the loss's gradient with respect to its embedding"}
    bad = _bad_rows(found)
    embeddings = any(len(rows) for (kind, _), rows in bad.items() if kind == "sides")
    for (kind, side), rows in bad.items():
        if kind == "pulls" and embeddings:  # of all rows then, which says nothing
            continue
        total = len(found[kind][SIDES.index(side)])
        if len(rows):
            lines.append(f"{side}: {told[kind]} is not finite in {len(rows)} of {total} rows")
            lines += [f"  {_name(side, row, total, names)}" for row in rows[:_SHOWN].tolist()]
    for what in ("vectors", "scores"):
        values = getattr(batch, what)
        rows = [] if values is None else np.flatnonzero(np.isnan(values).any(axis=1))
        if len(rows):
            lines.append(f"the batch's {what} are no numbers in rows {rows[:_SHOWN].tolist()}")
    if lines:
        return lines
    lines.append("embeddings, and the loss's gradients with respect to them, are finite")
    for side, pulls in zip(SIDES, found["pulls"], strict=False):
        norms = np.linalg.norm(pulls, axis=1)
        lines.append(f"{side}: rows that pull most")
        for row in np.argsort(-norms, kind="stable")[:_SHOWN].tolist():
            lines.append(f"  {norms[row]:.3g}  {_name(side, row, len(norms), names)}")
    return lines


def _of_parameters(norms: Mapping[str, Any]) -> list[str]:
    bad = sorted(path for path, norm in norms.items() if not np.isfinite(norm))
    if not bad:
        return ["the gradients of all parameters are finite"]
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return [
        f"gradients that are not finite: {len(bad)} of {len(norms)} parameters: "
        f"{', '.join(bad[:_SHOWN])}{more}"
    ]


def _alone(look, trainable, frozen, batch: Batch, found, names, mesh) -> list[str]:
    """Encodes rows alone, without dropout; names those whose own gradient is not finite."""
    bad = []
    for side, pulls in zip(SIDES, found["pulls"], strict=False):
        groups, order = getattr(batch, side), getattr(batch, f"{side}_order")
        places = [(group, row) for group in groups for row in range(group.rows)]
        for row, pull in enumerate(pulls):
            group, place = places[row if order is None else order[row]]
            one = jax.tree.map(lambda x, place=place: x[place : place + 1], group)
            single = Batch((one,), (), np.zeros(1, np.int32), None, vectors=pull[None])
            placed = steps.place_batch(single, mesh)
            norm = float(look(trainable, frozen, placed, jax.random.key(0))["norm"])
            if not np.isfinite(norm):
                bad.append(f"  {side}: {_name(side, row, len(pulls), names)}")
    if not bad:
        return ["no row alone has a gradient that is not finite"]
    return [f"rows whose own gradient is not finite: {len(bad)}", *bad[:_SHOWN]]


def _name(side: str, row: int, total: int, names: Sequence[dict]) -> str:
    """Names a row of a side; of several negatives of a row, and stage 1's texts, the row's own."""
    each = max(1, total // len(names))
    place = row // each if side == "negative" else row % len(names)
    return f"row {row}: {names[place]}"
