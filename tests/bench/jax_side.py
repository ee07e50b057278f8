"""Our side of a training step, as `train` takes it: `python jax_side.py FOLDER`, then see workers.

What is timed is a step from arrays on the host to a finished state.
"""

import operator
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import rows as rows_files
import workers


def setup(folder: pathlib.Path):
    import jax
    from flax import nnx

    from unime_jax import embedder, loop, optim, runtime, sharding, steps, train_data
    from unime_jax.types import flatten

    runtime.start()
    settings = rows_files.read_case(folder)
    mesh = sharding.make_mesh(**settings["mesh"])
    start = time.perf_counter()
    model, _ = embedder.load_model(
        settings["model"]["path"],
        dtype=settings["model"]["dtype"],
        attention=settings["model"]["attention"],
        remat=settings["model"]["remat"],
        mesh=mesh,
        part="all" if train_data.reads_images(settings) else "language",
        quantize=settings["train"]["quantize"],
    )
    load_seconds = time.perf_counter() - start
    embedder.attach_adapters(model, settings["train"]["adapters"], seed=0)
    graphdef, state = nnx.split(model)
    trainable, frozen = optim.split_by_settings(flatten(nnx.to_pure_dict(state)), settings["train"])
    del model, state
    with np.load(folder / "first.npz") as file:
        trainable = {path: jax.numpy.asarray(file[path]) for path in trainable}
    batch = as_batch(rows_files.load(folder / "rows.npz"))
    if settings["case"]["forward"]:
        act, at_once = forward(graphdef, frozen, batch, mesh)
        return _said(act, load_seconds) | {"at_once": at_once}, act
    optimizer, step = steps.from_settings(settings, graphdef, steps=1000, mesh=mesh)
    state = steps.create_state(trainable, optimizer, mesh=mesh)
    program = None

    def act():
        nonlocal state, program
        placed = steps.place_batch(batch, mesh)
        if program is None:  # as the loop does
            program = loop.compile_ahead(step, state, frozen, placed)
        state, metrics = step(state, frozen, placed)
        jax.block_until_ready(state)
        return {name: float(metrics[name]) for name in ("loss", "gradient_norm")}

    said = _said(act, load_seconds)
    if os.environ.get(workers.REPORTS):
        dtype = settings["model"]["dtype"]
        said |= report(
            lambda: _operations(dtype, step, state, frozen, steps.place_batch(batch, mesh)),
            lambda: _planned(program),
        )
    return said, act


def report(*parts: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what `plan` would say of the step; no figure is lost for a part that fails."""
    found, failed = {}, []
    for part in parts:
        try:
            found |= part()
        except Exception as error:
            failed.append(f"{type(error).__name__}: {workers.last_line(error)}")
    return found | ({"not reported": "; ".join(failed)} if failed else {})


def _operations(dtype: str, step, *arguments) -> dict[str, Any]:
    import jax

    from unime_jax.planning import flops, topology

    counted = flops.count(step, *arguments)
    chip = topology.of_device(jax.devices()[0].device_kind)
    return {
        "operations": {"model": counted.model, "hardware": counted.total},
        "peak_rate": chip and chip.rate(dtype),
    }


def _planned(program) -> dict[str, Any]:
    """Returns the peak that the compiler planned, where it says one: on accelerators."""
    import jax

    if jax.devices()[0].platform == "cpu":
        return {}
    peak = program.memory_analysis().peak_memory_in_bytes
    return {"planned_gib": peak / 2**30} if peak else {}


def _said(act, load_seconds: float):
    import jax

    start = time.perf_counter()
    first = act()
    seconds = time.perf_counter() - start
    device = jax.devices()[0].device_kind
    return {
        "load_seconds": load_seconds, "first_seconds": seconds, "first": first, "device": device
    }  # fmt: skip


def forward(graphdef, flat, batch, mesh):
    """Returns what embeds all rows as `unime_jax.embed` does, in groups of the library's size.

    And how many rows that is: positions of a row -> rows.
    """
    import jax

    from unime_jax import runner
    from unime_jax.types import unflatten

    size = sum(leaf.size for leaf in flat.values())
    run, params = runner.Runner(graphdef, size=size, mesh=mesh), unflatten(flat)

    def full(group):
        return run.limits.full(group.tokens.shape[1], group.tiles.shape[1])

    def groups():
        for group in batch.query:  # of all sides
            step = full(group)
            for start in range(0, group.rows, step):
                part = slice(start, start + step)
                yield jax.tree.map(operator.itemgetter(part), group), None

    def act():
        vectors = np.concatenate([vectors for _, vectors in run.run(params, groups())])
        orders = {side: getattr(batch, f"{side}_order") for side in rows_files.SIDES}
        return rows_files.fingerprint(
            {side: vectors[order] for side, order in orders.items() if order is not None}
        )

    return act, {str(x.tokens.shape[1]): min(x.rows, full(x)) for x in batch.query}


def as_batch(rows: rows_files.Rows):
    """Returns a batch whose groups of one shape are merged, as PyTorch's side has them."""
    from unime_jax import chunks
    from unime_jax.types import Batch, Inputs

    def inputs(group):
        return Inputs(*(getattr(group, name) for name in rows_files.FIELDS[:5]), grid=group.grid)

    sides = {side: tuple(map(inputs, groups)) for side, groups in rows.sides.items()}
    orders = {f"{side}_order": order for side, order in rows.orders.items()}
    empty = {"target": (), "target_order": None}
    batch = Batch(**{**empty, **sides, **orders}, vectors=rows.vectors, target_ids=rows.target_ids)
    return chunks.merge(batch)[0]


def peak() -> dict[str, float]:
    import jax

    stats = jax.devices()[0].memory_stats()
    return {"peak": stats["peak_bytes_in_use"] if stats else workers.process_peak()}


if __name__ == "__main__":
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        workers.keep_to_two_cores()
    workers.serve(lambda: setup(pathlib.Path(sys.argv[1])), peak)
