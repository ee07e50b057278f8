"""Trains one stage: distillation, alignment or hard-negative tuning.

    python -m unime_jax.train --config configs/smol_stage1.py
    python -m unime_jax.train --config configs/phi35v_stage2.py --config.model.path=DIR

The config file holds every setting; any key can be overridden with --config.key=value (all keys
with their meaning: unime_jax/config.py). The run lives in config.output: started again, it goes on
from its newest checkpoint; Ctrl-C or SIGTERM saves first.
"""

import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from unime_jax import checkpoint, embedder, optim, report, runtime, sharding, steps
from unime_jax.config import describe, parse, validate_train
from unime_jax.evaluation import smol
from unime_jax.train_data import TrainData, open_data, reads_images
from unime_jax.types import UserError, flatten, unflatten


def main(argv: list[str]) -> None:
    config = parse(argv, __doc__)
    validate_train(config)
    runtime.start()
    run(config)


def run(config) -> dict[str, float]:
    """Trains as the configuration says and returns the last step's metrics."""
    print(describe(config))
    settings = config.to_dict()
    # The run finds its base again from wherever it is loaded.
    settings["model"]["path"] = str(pathlib.Path(config.model.path).expanduser().resolve())
    if not config.data.fusion:
        settings["data"]["fusion"] = "together" if reads_images(settings) else "sum"
    mesh = sharding.make_mesh(**settings["mesh"])
    checkpoint.open_run(config.output, settings)

    model, directory = embedder.load_model(
        config.model.path,
        dtype=config.model.dtype,
        attention=config.model.attention,
        remat=config.model.remat,
        mesh=mesh,
        part="all" if reads_images(settings) else "language",
        quantize=config.train.quantize,
    )
    preparation = {key: settings["data"][key] for key in embedder.PREPARATION}
    base = embedder.Embedder(model, directory=directory, mesh=mesh, **preparation)
    data = open_data(settings, base)
    print(data.describe())
    embedder.attach_adapters(model, settings["train"]["adapters"], seed=config.seed)
    graphdef, state = nnx.split(model)
    trainable, frozen = optim.split_by_settings(flatten(nnx.to_pure_dict(state)), settings["train"])
    del model, state
    _print_sizes(trainable, frozen)

    optimizer, train_step = steps.from_settings(
        settings, graphdef, steps=data.steps, sets=data.sets, mesh=mesh
    )
    saves = checkpoint.Checkpoints(
        config.output,
        config=settings,
        keep=config.checkpoint.keep,
        every_steps=config.checkpoint.every_steps,
        every_seconds=config.checkpoint.every_seconds,
    )
    validate = _validation(config, graphdef, {**frozen, **trainable}, directory, mesh)
    state = steps.create_state(trainable, optimizer, mesh=mesh)
    return _loop(config, train_step, state, frozen, data, saves, validate, mesh)


def _validation(config, graphdef, flat, directory, mesh):
    """Returns `parameters -> metrics on held-out data`, or None where they are not wanted."""
    if not config.eval.every_steps:
        return None
    model = embedder.Embedder(
        nnx.merge(graphdef, unflatten(flat)),
        directory=directory,
        mesh=mesh,
        **{key: config.data[key] for key in embedder.PREPARATION},
    )
    if config.stage == "distill":
        heldout = smol.read_heldout(
            config.data.path,
            teacher=config.teacher.path,
            instruction=config.teacher.instruction or None,
        )
        measure = functools.partial(smol.validation_sentences, heldout=heldout)
    else:
        pairs = smol.read_pairs(config.data.path, "validation")
        measure = functools.partial(smol.validation_recall, pairs=pairs)

    def validate(parameters: dict[str, Any]) -> dict[str, float]:
        model.params = unflatten(parameters)
        return measure(model)

    return validate


def _loop(config, train_step, state, frozen, data: TrainData, saves, validate, mesh):
    restored = saves.restore(state)
    if restored is not None:
        state = restored
    first = int(state.step)
    if first >= data.steps:
        print(f"{config.output}: all {first} steps are done")
        return {}
    if first:
        print(f"{config.output}: going on after step {first}")
    writer = report.MetricsWriter(
        config.output, first_step=first, tensorboard=config.log.tensorboard
    )
    batches = data.batches(first)
    pending, metrics = None, {}
    print("compiling the step ...", flush=True)
    with runtime.StopRequest() as stop:
        started = time.perf_counter()
        for step in range(first, data.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            state, values = train_step(state, frozen, steps.place_batch(batch, mesh))
            # Metrics of the step before are read while this one runs.
            if pending is not None:
                metrics = _record(writer, progress, config, *pending)
            if step == first:
                jax.block_until_ready(values)
                print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
                progress = report.Progress(data.steps, f"training ({config.stage})", start=step + 1)
            now = time.perf_counter()
            pending = (step, values, data.counts | {"waited": waited}, now - started)
            if validate and (step + 1) % config.eval.every_steps == 0:
                writer.write(step + 1, validate({**frozen, **state.trainable}))
            started = time.perf_counter()
            saves.save(state)
            if stop.signal is not None:
                break
        metrics = _record(writer, progress, config, *pending)
        saves.save(state, force=True)
        saves.close()
    progress.close()
    writer.close()
    if stop.signal is not None:
        print(f"saved after step {int(state.step)}; the same command goes on from there")
        raise KeyboardInterrupt
    print(f"done: {config.output}" + data.summary())
    return metrics


def _record(writer, progress, config, step, values, counts: dict[str, float], seconds):
    """Reads a step's metrics off the device, logs and shows them."""
    metrics = {name: float(np.asarray(value)) for name, value in jax.device_get(values).items()}
    if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["gradient_norm"]):
        raise UserError(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}; "
            f"lower config.optim.learning_rate or check the data of this step"
        )
    metrics |= {
        "pairs_per_second": counts["rows"] / seconds,
        "tokens_per_second": counts["tokens"] / seconds,
        "padded_share": counts["padded_share"],
        "data_seconds": counts["waited"],
        "seconds": seconds,
    }
    if (step + 1) % config.log.every_steps == 0 or step + 1 == progress.total:
        writer.write(step + 1, metrics)
    progress.update(step + 1, f"loss {metrics['loss']:.4f}")
    return metrics


def _print_sizes(trainable: dict[str, Any], frozen: dict[str, Any]) -> None:
    def millions(tree):
        return sum(x.size for x in tree.values()) / 1e6

    print(
        f"{millions(trainable):.2f} M trainable parameters in {len(trainable)} arrays, "
        f"{millions(frozen):.1f} M frozen; {jax.device_count()} {jax.default_backend()} device(s)"
    )


if __name__ == "__main__":
    runtime.run_entry(main)
