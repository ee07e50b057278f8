"""What runs and conversions leave on the disk: checkpoints, run and model directories."""

from unime_jax.checkpoint.kept import keep, release
from unime_jax.checkpoint.model_directory import (
    is_model,
    read_model,
    read_model_leaf,
    read_model_notes,
    write_model,
)
from unime_jax.checkpoint.run_directory import (
    RUN_FILE,
    Found,
    Hashes,
    check_continues,
    check_data,
    check_files,
    has_begun,
    is_run,
    locate,
    lock,
    open_run,
    read_run,
    record,
    take_old_values,
)
from unime_jax.checkpoint.runs import Checkpoints, newest, read_state, read_trainable

__all__ = [
    "RUN_FILE",
    "Checkpoints",
    "Found",
    "Hashes",
    "check_continues",
    "check_data",
    "check_files",
    "has_begun",
    "is_model",
    "is_run",
    "keep",
    "locate",
    "lock",
    "newest",
    "open_run",
    "read_model",
    "read_model_leaf",
    "read_model_notes",
    "read_run",
    "read_state",
    "read_trainable",
    "record",
    "release",
    "take_old_values",
    "write_model",
]
