"""What a run starts from: its base, and initial values from another run or an adapter.

Where either is a run, which may still train, its checkpoint of now is meant ever after.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from unime_jax import checkpoint, runtime, weights
from unime_jax.models import hf, peft
from unime_jax.types import UserError


def base(output: str | os.PathLike, name: str, *, replays: bool = False) -> str:
    """Returns what `config.model.path` means to a run.

    Args:
      output: the run. Where it has begun, what it began from.
      name: the setting. A run stands for the newest checkpoint that it has now, which is to stay,
        however long that run trains.
      replays: what this run started from last is meant, whether it has saved anything or not.

    Raises:
      UserError: there is no such checkpoint; all processes raise it.
    """
    return runtime.by_main(lambda: _base(output, name, replays), wait=runtime.HASHING_MS)


def _base(output: str | os.PathLike, name: str, replays: bool) -> str:
    run, step = checkpoint.locate(name)
    if not checkpoint.is_run(name):
        return name
    if run.resolve() == checkpoint.locate(output)[0].resolve():
        raise UserError(f"config.model.path={name} is config.output as well; choose another output")
    if replays or _has_begun(output):
        model = checkpoint.read_run(output).get("model")
        recorded = model.get("path") if isinstance(model, dict) else None
        meant = _of_then(name, recorded) if isinstance(recorded, str) and step is None else name
        if not replays and meant != recorded and checkpoint.locate(meant)[1] is not None:
            _pinned(output, meant)
        return meant
    found = _pinned(output, name)
    if step is None:
        print(f"config.model.path={name}: its newest checkpoint now, {found.name}, is the base")
    return str(found)


def _of_then(name: str, recorded: str) -> str:
    """Returns what a run as the base means where another path of it was recorded."""
    run, _ = checkpoint.locate(name)
    then, number = checkpoint.locate(recorded)
    if then == run:
        return recorded
    moved = run / pathlib.Path(recorded).relative_to(then)  # its checkpoint of then, or a copy
    return str(moved) if number is not None and moved.is_dir() else name


def _pinned(output: str | os.PathLike, name: str) -> pathlib.Path:
    """Returns the checkpoint that a run stands for now, which is to stay."""
    step = checkpoint.locate(name)[1]
    found = checkpoint.newest(name) if step is None else pathlib.Path(name)
    while not checkpoint.keep(found, output):
        if found.is_dir():
            print(f"{found} cannot be marked as needed by {output}; see that it is not removed")
        if found.is_dir() or step is not None:
            break
        found = checkpoint.newest(name)  # that one was removed meanwhile
    return found


def check(output: str | os.PathLike, name: str) -> None:
    """Checks that `config.init_from` names something to start from, unless the run has begun.

    Raises:
      UserError: it does not.
    """
    if not name or _has_begun(output):
        return
    path = pathlib.Path(name).expanduser()
    if not path.exists():
        raise UserError(f"config.init_from={name}: no such file or directory")
    if not checkpoint.is_run(path) and not peft.is_adapter(path):
        raise UserError(
            f"config.init_from={name}: neither a training run nor a PEFT adapter "
            f"({peft.CONFIG_FILE}); a model to start from is config.model.path"
        )
    run, step = checkpoint.locate(path)
    if checkpoint.is_run(path) and step is None and not checkpoint.has_begun(run):
        raise UserError(f"config.init_from={name}: no checkpoint there yet; let the run save one")


def resolve(output: str | os.PathLike, name: str, *, replays: bool = False) -> str:
    """Returns what `config.init_from` means to a run.

    Args:
      output: the run. Where it has begun, what it began from.
      name: the setting. A run stands for the newest checkpoint that it has now, which is to stay.
      replays: see `base`.

    Raises:
      UserError: there is no such thing; all processes raise it.
    """
    return runtime.by_main(lambda: _resolve(output, name, replays), wait=runtime.HASHING_MS)


def _resolve(output: str | os.PathLike, name: str, replays: bool) -> str:
    if replays or _has_begun(output):
        if name and not replays:
            print(f"{output} goes on from its own checkpoint, not from {name}")
        recorded = checkpoint.read_run(output).get("init_from")
        return recorded if isinstance(recorded, str) else ""
    check(output, name)
    # A step before this run's first checkpoint may be taken again at any time.
    return str(_pinned(output, name)) if name and checkpoint.is_run(name) else name


def _has_begun(output: str | os.PathLike) -> bool:
    return checkpoint.is_run(output) and checkpoint.has_begun(output)


def read(settings: Mapping[str, Any], trainable: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters that a run starts from.

    Args:
      settings: the resolved configuration.
      trainable: what the run trains, with the values it would have had; those that the other run
        did not train keep them.

    Raises:
      UserError: the other one trained what this one does not or in other shapes, or is a run on
        another base. (An adapter's name for its base is no proof; another one is said.)
    """
    name = settings["init_from"]
    path = pathlib.Path(name)
    if not path.exists():
        raise UserError(
            f"config.init_from={name}, which the run begins from, is not there: put it back"
        )
    if checkpoint.is_run(path):
        _check_base(path, settings["model"]["path"])
    elif peft.is_adapter(path):
        _say_base(path, settings["model"]["path"])
    found = weights.find(settings["model"]["path"], adapter=path)
    change = found.changes[-1]
    adapters = settings["train"]["adapters"]
    scale = adapters["alpha"] / adapters["rank"] if adapters["rank"] else 1.0
    rules = {rule.ours: rule for rule in found.key_map.rules}
    values, problems, used = {}, [], set()
    for parameter, leaf in trainable.items():
        module, _, kind = parameter.rpartition("/")
        low_rank = kind in ("lora_A", "lora_B")
        rule = rules[f"{module}/kernel" if low_rank else parameter]
        keys = hf.keys_of(rule, leaf.shape)
        there = [key for key in keys if key in (change.low_rank if low_rank else change.replaced)]
        if not there:
            continue
        used.update(there)
        if len(there) < len(keys):
            problems.append(f"{parameter}: {len(there)} of {len(keys)} layers")
            continue
        layers = [_value(change, key, kind, rule, scale) for key in keys]
        value = np.stack(layers) if rule.stacked else layers[0]
        if value.shape != leaf.shape:
            problems.append(f"{parameter}: {value.shape} there, {leaf.shape} here")
        values[parameter] = value.astype(leaf.dtype)
    problems += [
        f"{key}: trained there, not here"
        for key in sorted({*change.low_rank, *change.replaced} - used)
    ]
    if problems:
        raise UserError(
            f"config.init_from={name} does not fit: {hf.listed('problem(s)', problems)}"
        )
    print(
        f"starting from {name}: {len(values)} arrays as they were trained there, "
        f"{len(trainable) - len(values)} new ones"
    )
    return {**trainable, **values}


def _value(change: peft.Adapter, key: str, kind: str, rule: hf.Rule, scale: float) -> np.ndarray:
    """Returns a parameter of one layer; adapters so that they do here what they did there."""
    if kind not in ("lora_A", "lora_B"):
        return hf.from_file(change.replaced[key], rule)
    found = change.low_rank[key]
    if found.magnitude is not None:
        raise UserError(
            f"config.init_from={change.name} is a DoRA adapter, which cannot be trained"
        )
    return found.a.T if kind == "lora_A" else found.b.T * np.float32(found.scale / scale)


def _say_base(adapter: pathlib.Path, base: str) -> None:
    own = hf.read_json(adapter / peft.CONFIG_FILE).get("base_model_name_or_path")
    if isinstance(own, str) and own and pathlib.Path(own).name != pathlib.Path(base).name:
        print(f"config.init_from={adapter}: was trained on {own}; config.model.path is {base}")


def _check_base(run: pathlib.Path, base: str) -> None:
    model = checkpoint.read_run(run).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        raise UserError(f"{run}/{checkpoint.RUN_FILE}: no model.path; is the file damaged?")
    own = pathlib.Path(model["path"])
    here = pathlib.Path(base)
    (own_run, own_step), (here_run, here_step) = map(checkpoint.locate, (own, here))
    moved = not own_run.is_dir() and own_run.name == here_run.name
    # Runs of before name a run as their base without a step.
    if (own_run == here_run or moved) and (own_step == here_step or None in (own_step, here_step)):
        return
    if here_run.resolve() == checkpoint.locate(run)[0].resolve():
        raise UserError(
            f"config.init_from={run} is config.model.path as well: what it trained would count "
            f"twice; leave config.init_from empty, or set config.model.path={own}"
        )
    raise UserError(
        f"config.init_from={run} was trained on {own}, and config.model.path is {here}; set "
        "config.model.path to the former"
    )
