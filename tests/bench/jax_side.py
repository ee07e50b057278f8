"""Our side of a training step, as `train` takes it: `python jax_side.py FOLDER`, then see workers.

What is timed is a step from arrays on the host to a finished state.
"""

import operator
import os
import pathlib
import sys
import time
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
        act = forward(graphdef, frozen, batch, mesh)
        return _said(act, load_seconds), act
    optimizer, step = steps.from_settings(settings, graphdef, steps=1000, mesh=mesh)
    state = steps.create_state(trainable, optimizer, mesh=mesh)
    ahead = False

    def act():
        nonlocal state, ahead
        placed = steps.place_batch(batch, mesh)
        if not ahead:  # as the loop does
            loop.compile_ahead(step, state, frozen, placed)
            ahead = True
        state, metrics = step(state, frozen, placed)
        jax.block_until_ready(state)
        return {name: float(metrics[name]) for name in ("loss", "gradient_norm")}

    said = _said(act, load_seconds)
    if os.environ.get(workers.REPORTS):
        said |= _report(step, state, frozen, steps.place_batch(batch, mesh), settings)
    return said, act


def _report(step, *arguments_and_settings) -> dict[str, Any]:
    """Returns what `plan` would say of the step: its operations, and its peak on an accelerator."""
    import jax

    from unime_jax.planning import flops, topology

    *arguments, settings = arguments_and_settings
    device = jax.devices()[0]
    counted = flops.count(step, *arguments)
    chip = topology.of_device(device.device_kind)
    found = {
        "operations": {"model": counted.model, "hardware": counted.total},
        "peak_rate": chip and chip.rate(settings["model"]["dtype"]),
    }
    if device.platform != "cpu":
        program = step.lower(*arguments).compile()
        found["planned_gib"] = program.memory_analysis().peak_memory_in_bytes / 2**30
    return found


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
    """Returns what embeds all rows as `unime_jax.embed` does, in groups of the library's size."""
    import jax

    from unime_jax import runner
    from unime_jax.types import unflatten

    size = sum(leaf.size for leaf in flat.values())
    run, params = runner.Runner(graphdef, size=size, mesh=mesh), unflatten(flat)

    def groups(side):
        for group in getattr(batch, side):
            step = run.limits.full(group.tokens.shape[1], group.tiles.shape[1])
            for start in range(0, group.rows, step):
                part = slice(start, start + step)
                yield jax.tree.map(operator.itemgetter(part), group), None

    def act():
        found = {}
        for side in ("query", "target"):
            vectors = [vectors for _, vectors in run.run(params, groups(side))]
            found[side] = np.concatenate(vectors)[getattr(batch, f"{side}_order")]
        return rows_files.fingerprint(found)

    return act


def as_batch(rows: rows_files.Rows):
    from unime_jax.types import Batch, Inputs

    def inputs(group):
        return Inputs(*(getattr(group, name) for name in rows_files.FIELDS[:5]), grid=group.grid)

    sides = {side: tuple(map(inputs, groups)) for side, groups in rows.sides.items()}
    orders = {f"{side}_order": order for side, order in rows.orders.items()}
    empty = {"target": (), "target_order": None}
    return Batch(**{**empty, **sides, **orders}, vectors=rows.vectors, target_ids=rows.target_ids)


def peak() -> dict[str, float]:
    import jax

    stats = jax.devices()[0].memory_stats()
    return {"peak": stats["peak_bytes_in_use"] if stats else workers.process_peak()}


if __name__ == "__main__":
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        workers.keep_to_two_cores()
    workers.serve(lambda: setup(pathlib.Path(sys.argv[1])), peak)
