"""Trains one stage: distillation, alignment or hard-negative tuning.

    python -m unime_jax.train --config configs/smol_stage1.py
    python -m unime_jax.train --config configs/phi35v_stage2.py --config.model.path=DIR

The config file holds every setting; any key can be overridden with --config.key=value (all keys
with their meaning: unime_jax/config.py). The run lives in config.output: started again, it goes on
from its newest checkpoint; Ctrl-C or SIGTERM saves first. Several hosts each run the same command:
launch/ has scripts, unime_jax/cluster.py says how the processes find each other.
"""

import functools
import pathlib
from typing import Any

import jax
from flax import nnx

from unime_jax import checkpoint, embedder, loop, optim, runtime, sharding, steps
from unime_jax.config import describe, parse, validate_train
from unime_jax.evaluation import smol
from unime_jax.train_data import open_data, reads_images
from unime_jax.types import UserError, flatten, unflatten


def main(argv: list[str]) -> None:
    config = parse(argv, __doc__)
    validate_train(config)
    runtime.start(preemptible=True)
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
    _set_feature_dropout(model, config.train.feature_dropout)
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
    return loop.Loop(settings, train_step, frozen, data, saves, validate, mesh).run(state)


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
