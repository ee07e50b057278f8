"""Trains one stage: distillation, alignment or hard-negative tuning.

    python -m unime_jax.train --config configs/smol_stage1.py
    python -m unime_jax.train --config configs/phi35v_stage2.py --config.model.path=DIR

The config file holds every setting; any key can be overridden with --config.key=value (all keys
with their meaning: unime_jax/config.py). The run lives in config.output: started again, it goes on
from its newest whole checkpoint; Ctrl-C or SIGTERM saves first. --config.train.replay=STEP takes a
step of it again and tells what its loss comes from. Several hosts each run the same command:
launch/ has scripts, unime_jax/cluster.py says how the processes find each other.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
from flax import nnx

from unime_jax import (
    allocator,
    checkpoint,
    embedder,
    file_hashes,
    initial,
    loop,
    optim,
    replay,
    runtime,
    sharding,
    steps,
    weights,
)
from unime_jax.config import describe, parse, validate_train
from unime_jax.data import teacher_vectors
from unime_jax.evaluation import smol
from unime_jax.train_checks import check_run
from unime_jax.train_data import TrainData, image_start, open_data, reads_images
from unime_jax.types import UserError, flatten, unflatten


def main(argv: list[str]) -> None:
    config = parse(argv, __doc__)
    validate_train(config)
    check_run(config.to_dict())
    allocator.bound_arenas()
    runtime.start(preemptible=True)
    run(config)


def run(config) -> dict[str, float]:
    """Trains as the configuration says and returns the last step's metrics."""
    print(describe(config))
    config.output = str(pathlib.Path(config.output).expanduser())
    settings = config.to_dict()
    # The run finds its base again from wherever it is loaded.
    for section, key in ((settings["model"], "path"), (settings, "init_from")):
        if section[key]:
            section[key] = str(pathlib.Path(section[key]).expanduser().resolve())
    if not config.data.fusion:
        settings["data"]["fusion"] = "together" if reads_images(settings) else "sum"
    checkpoint.take_old_values(config.output, settings, steps.drawn_by_groups(settings))
    if config.train.replay:
        return _replay(config, settings)
    with checkpoint.lock(config.output):
        settings["init_from"] = initial.resolve(config.output, settings["init_from"])
        settings["model"]["path"] = initial.base(config.output, settings["model"]["path"])
        wanted = settings["init_from"], settings["model"]["path"]
        checkpoint.release(config.output, wanted)
        checkpoint.open_run(config.output, settings)
        return _train(config, settings)


def _train(config, settings: dict[str, Any]) -> dict[str, float]:
    run = _open(config, settings)
    _check_data(config, settings, run.data)
    checkpoint.record(config.output, settings)
    saves = checkpoint.Checkpoints(
        config.output,
        config=settings,
        keep=config.checkpoint.keep,
        keep_best=config.checkpoint.keep_best,
        best_mode=config.checkpoint.best_mode,
        every_steps=config.checkpoint.every_steps,
        every_seconds=config.checkpoint.every_seconds,
    )
    trainable = run.trainable
    if settings["init_from"] and saves.latest is None:
        trainable = initial.read(settings, trainable)
    validate = _validation(
        config, run.graphdef, {**run.frozen, **trainable}, run.directory, run.mesh
    )
    state = steps.create_state(trainable, run.optimizer, mesh=run.mesh)
    return loop.Loop(settings, run.train_step, run.frozen, run.data, saves, validate, run.mesh).run(
        state
    )


def _replay(config, settings: dict[str, Any]) -> dict[str, float]:
    """Takes one step of a run again and tells what its loss and gradient come from."""
    if not checkpoint.is_run(config.output):
        raise UserError(f"config.train.replay: {config.output} holds no run; set config.output")
    model = settings["model"]
    model["path"] = initial.base(config.output, model["path"], replays=True)
    checkpoint.check_continues(config.output, settings)
    settings["init_from"] = initial.resolve(config.output, settings["init_from"], replays=True)
    run = _open(config, settings)
    _check_data(config, settings, run.data)
    trainable = run.trainable
    if settings["init_from"]:
        if not checkpoint.has_begun(config.output, before=config.train.replay):
            trainable = initial.read(settings, trainable)
    state = steps.create_state(trainable, run.optimizer, mesh=run.mesh)
    return replay.run(settings, run.graphdef, run.train_step, run.frozen, run.data, state, run.mesh)


def _check_data(config, settings: dict[str, Any], data: TrainData) -> None:
    """Checks that the rows are those that the run began with; versions before counted paths."""

    def earlier(recorded: dict[str, Any]) -> list[checkpoint.Found]:
        starts = dict.fromkeys(image_start(each["data"]) for each in (recorded, settings))
        return [data.fingerprint(start) for start in starts]

    keep = not config.train.replay
    checkpoint.check_data(config.output, data.fingerprint(), keep=keep, earlier=earlier)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a configuration opens: the model with its adapters, its data and its step."""

    mesh: Any
    directory: pathlib.Path
    graphdef: Any
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    data: TrainData
    optimizer: Any
    train_step: Any


def _open(config, settings: dict[str, Any]) -> _Run:
    mesh = sharding.make_mesh(**settings["mesh"])
    found = weights.find(settings["model"]["path"])
    checkpoint.check_files(
        config.output, lambda: _hashes(found, settings), keep=not config.train.replay
    )
    model = embedder.build(
        found,
        dtype=config.model.dtype,
        attention=config.model.attention,
        remat=config.model.remat,
        mesh=mesh,
        part="all" if reads_images(settings) else "language",
        quantize=config.train.quantize,
    )
    directory = found.directory
    del found  # with what a base that is a run has trained, which the model holds by now
    preparation = {key: settings["data"][key] for key in embedder.PREPARATION}
    base = embedder.Embedder(model, directory=directory, mesh=mesh, **preparation)
    data = open_data(settings, base)
    print(data.describe())
    embedder.attach_adapters(model, settings["train"]["adapters"], seed=config.seed)
    _set_feature_dropout(model, config.train.feature_dropout)
    graphdef, state = nnx.split(model)
    trainable, frozen = optim.split_by_settings(flatten(nnx.to_pure_dict(state)), settings["train"])
    _print_sizes(trainable, frozen)
    optimizer, train_step = steps.from_settings(
        settings, graphdef, steps=data.steps, sets=data.sets, mesh=mesh
    )
    return _Run(mesh, directory, graphdef, trainable, frozen, data, optimizer, train_step)


def _hashes(found: weights.Weights, settings: dict[str, Any]) -> checkpoint.Hashes:
    """Returns hashes of what a run reads besides its rows: its base, its teacher's vectors."""
    hashes = {"config.model.path": found.digests}
    if settings["stage"] == "distill":
        files = teacher_vectors.files(settings["teacher"]["vectors"])
        contents = file_hashes.of_files(files, runtime.cache_directory())
        names = [path.name for path in files]
        hashes["config.teacher.vectors"] = {
            name: content.hex() for name, content in zip(names, contents, strict=True)
        }
    return hashes


def _set_feature_dropout(model: nnx.Module, rate: float) -> None:
    projector = getattr(model, "multi_modal_projector", None)
    if hasattr(projector, "dropout"):
        projector.dropout = rate
    elif rate:
        raise UserError(
            f"config.train.feature_dropout={rate}: only the projector of a unime_smol drops "
            "features; set it to 0"
        )


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


def _print_sizes(trainable: dict[str, Any], frozen: dict[str, Any]) -> None:
    def millions(tree):
        return sum(x.size for x in tree.values()) / 1e6

    print(
        f"{millions(trainable):.2f} M trainable parameters in {len(trainable)} arrays, "
        f"{millions(frozen):.1f} M frozen; {jax.device_count()} {jax.default_backend()} device(s)"
    )


if __name__ == "__main__":
    runtime.run_entry(main)
