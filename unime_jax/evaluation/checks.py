"""Checks that all benchmarks of published sets share."""

import pathlib

from unime_jax import embedder, sharding
from unime_jax.config import check, check_choice, check_path


def common(config, directory: str) -> None:
    """Checks the keys that both configurations have.

    Args:
      config: of the evaluation.
      directory: what config.data.path is to be the directory of.

    Raises:
      UserError: the first impossible value, named with its key.
    """
    check(bool(config.output), "config.output is empty; name a directory with --config.output=DIR")
    check(config.limit >= 0, f"config.limit={config.limit}: must not be negative; 0 means all")
    check(
        bool(config.model.path),
        "config.model.path is empty; give a model with --config.model.path=DIR",
    )
    check_choice(config, "model.dtype", embedder.DTYPES)
    check_choice(config, "data.fusion", ("", *embedder.FUSIONS))
    for key in ("image_size", "image_crops"):
        value = config.data[key]
        check(value is None or value >= 0, f"config.data.{key}={value}: must not be negative")
    unknown = sorted(set(config.mesh) ^ set(sharding.AXES))
    check(not unknown, f"config.mesh: the axes are {', '.join(sharding.AXES)}")
    check_path(config, "data.path")
    check(
        pathlib.Path(config.data.path).expanduser().is_dir(),
        f"config.data.path={config.data.path}: give the directory {directory}",
    )
