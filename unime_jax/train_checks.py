"""Checks that what a training run names fits together, before its model is loaded."""

import pathlib
from collections.abc import Mapping
from typing import Any

from unime_jax import initial
from unime_jax.config import check
from unime_jax.data import mmeb, nli, sources, task_pairs
from unime_jax.types import UserError

_TAKEN = (
    "pairs of your own (.jsonl, .json, .parquet), nli_for_simcse.csv (.csv), or a directory that "
    "`python -m unime_jax.prepare smol` or `prepare mmeb` wrote"
)
# Stage -> the kinds of data that it reads, and what it needs in words.
_READ = {
    "distill": ({"pairs", "nli", "smol"}, "distillation reads sentences, or pairs of one image and "
                "one text"),
    "align": ({"pairs", "smol"}, "alignment needs pairs of image and text"),
    "contrast": ({"pairs", "tasks", "nli", "smol", "mmeb"}, ""),
    "judge": ({"tasks"}, 'config.stage="judge" needs pairs with hard_negatives and their scores '
              "(see unime_jax/data/task_pairs.py)"),
}  # fmt: skip


def check_run(settings: Mapping[str, Any]) -> None:
    """Checks a run whose values are sound and whose files are there.

    Args:
      settings: the resolved configuration.

    Raises:
      UserError: stage, data, validation or initial values do not fit.
    """
    kind, path, every = check_data(settings), settings["data"]["path"], settings["eval"]
    if every["every_steps"] and kind != "smol":
        command = f"python -m unime_jax.prepare smol --pairs {path}"
        way = f", or train on what `{command}` writes: it holds some out" if kind == "pairs" else ""
        raise UserError(
            f"config.eval.every_steps={every['every_steps']}: {path} has no held-out part; set "
            f"config.eval.every_steps=0{way}"
        )
    initial.check(pathlib.Path(settings["output"]).expanduser(), settings["init_from"])


def check_data(settings: Mapping[str, Any]) -> str:
    """Checks that a run's stage and settings fit its data, as far as it shows without reading them.

    Args:
      settings: the resolved configuration.

    Returns:
      their kind: "pairs" (image and caption), "tasks" (`task_pairs`), "nli", or what `prepare`
      wrote: "smol", "mmeb".

    Raises:
      UserError: they do not fit, or are of no kind.
    """
    data, stage = settings["data"], settings["stage"]
    path = pathlib.Path(data["path"]).expanduser()
    kind, where = _kind(path), f"config.data.path={path}"
    kinds, need = _READ[stage]
    check(kind in kinds, f"{where}: {need}")
    check(
        not data["features"] or kind in ("pairs", "smol") or stage == "distill",
        f"{where}: cached features need plain image-caption pairs; set config.data.features=''",
    )
    check(
        kind != "nli" or stage != "contrast" or not settings["loss"]["k"],
        f"config.loss.k={settings['loss']['k']}: rows of {path} bring their own negatives, none "
        "are mined; set config.loss.k=0",
    )
    if kind == "mmeb":
        mmeb.choose(path, data["sets"])
    else:
        check(
            not data["sets"],
            f"config.data.sets={', '.join(data['sets'])}: {path} holds no sets of MMEB",
        )
    return kind


def _kind(path: pathlib.Path) -> str:
    if nli.is_nli(path):
        return "nli"
    if task_pairs.reads(path):
        return "tasks"
    if path.suffix == ".jsonl":
        return "pairs"
    if mmeb.is_prepared(path):
        return "mmeb"
    if sources.is_prepared(path):
        return "smol"
    raise UserError(f"config.data.path={path}: no training data; give {_TAKEN}")
