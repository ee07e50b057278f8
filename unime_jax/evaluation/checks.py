"""Checks that all benchmarks of published sets share."""

import pathlib

from unime_jax import embedder, runtime
from unime_jax.config import check, check_choice, check_like, check_path, evaluation_config, lookup


def common(config, directory: str) -> None:
    """Checks the keys that both configurations have.

    Args:
      config: of the evaluation.
      directory: what config.data.path is to be the directory of.

    Raises:
      UserError: the first impossible value, named with its key.
    """
    check_like(config, evaluation_config())
    check(bool(config.output), "config.output is empty; name a directory with --config.output=DIR")
    runtime.check_output(config.output, "config.output")
    cache = config.cache or runtime.cache_directory() / "vectors"
    runtime.check_output(cache, "config.cache")
    check(config.limit >= 0, f"config.limit={config.limit}: must not be negative; 0 means all")
    named = not config.sets or bool(config.sets.strip(" ,"))
    check(named, f'config.sets={config.sets!r}: names no set; "" means all')
    check(
        bool(config.model.path),
        "config.model.path is empty; give a model with --config.model.path=DIR",
    )
    check_choice(config, "model.dtype", embedder.DTYPES)
    check_choice(config, "data.fusion", ("", *embedder.FUSIONS))
    for key in ("image_size", "image_crops"):
        value = config.data[key]
        check(value is None or value >= 0, f"config.data.{key}={value}: must not be negative")
    directories = {"data.path": directory}
    if config.images:
        directories["images"] = "that the images' paths start from"
    if config.image_root:
        directories["image_root"] = "that no image lies outside of"
    for key, what in directories.items():
        check_path(config, key)
        path = lookup(config, key)
        is_there = pathlib.Path(path).expanduser().is_dir()
        check(is_there, f"config.{key}={path}: give the directory {what}")
