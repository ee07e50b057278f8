"""Brings weights in and out: Hugging Face and PEFT directories <-> ours.

    python -m unime_jax.convert import   --model HF_DIR --output CKPT
    python -m unime_jax.convert export   --model RUN --output HF_DIR [--text-only]
    python -m unime_jax.convert adapters --model RUN --output PEFT_DIR
    python -m unime_jax.convert merge    --model HF_DIR --adapter PEFT_DIR --output HF_DIR

import    writes a model directory of ours (Orbax), which loads sharded on any mesh
export    writes a directory that transformers and vLLM load, adapters merged, with a model card;
          --text-only: its language model alone, which sentence-transformers loads as well
adapters  writes what a run trained in PEFT's format, for the model that it started from
merge     writes a Hugging Face directory with an adapter merged into its weights

--model is a Hugging Face directory or its id on the hub ("organisation/model"), a model directory
of ours, the output directory of a training run, or a PEFT adapter whose base is at hand. Tensors
keep their dtype unless --dtype says otherwise; sums are computed in f32. Everything happens on the
host. The output directory must not exist or be empty, and appears when it is complete.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unime_jax import arguments, checkpoint, model_card, models, report, runtime, text_side, weights
from unime_jax.models import hf, hf_write, peft
from unime_jax.types import UserError, flatten, unflatten

# Files beside the weights that belong to a model: tokenizer, processor, prompts, the code of
# models that transformers does not know.
_COPIED = re.compile(r".*\.(json|txt|model|jinja|py|md)|LICENSE.*|NOTICE.*|.*\.tiktoken")
_NOT_COPIED = re.compile(
    r".*\.index\.json|adapter_.*|README\.md|(model|run|trainer_state|config)\.json"
)
_FLOATS = ("F64", "F32", "F16", "BF16")


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv[1:])
    # Tensors pass through the host's memory; an accelerator would only be in the way.
    jax.config.update("jax_platforms", "cpu")
    runtime.start()
    _check_output(args.output)
    args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(prog="python -m unime_jax.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    rows = (
        ("import", import_model, "Hugging Face -> ours (Orbax)"),
        ("export", export_model, "ours or a run -> Hugging Face"),
        ("adapters", export_adapters, "a run -> PEFT"),
        ("merge", export_model, "Hugging Face + PEFT -> Hugging Face"),
    )
    for name, run, text in rows:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run, adapter=None, text_only=False)
        command.add_argument("--model", required=True, help="directory or hub id")
        command.add_argument("--output", required=True, help="new directory")
        if name == "adapters":
            command.add_argument(
                "--base", help="what the adapter names as its base (the path of the run's base)"
            )
            continue
        command.add_argument(
            "--adapter", required=name == "merge", help="PEFT adapter or run to merge into it"
        )
        command.add_argument(
            "--dtype",
            choices=["float32", "bfloat16", "float16"],
            help="of all tensors (as they are stored)",
        )
        if name == "export":
            command.add_argument(
                "--text-only", action="store_true", help="the language model, without the images"
            )
        if name != "import":
            command.add_argument(
                "--shard-gb", type=_size, default=5.0, help="largest file of weights (%(default)s)"
            )
    return parser


def _size(text: str) -> float:
    """Reads a number of GB; argparse names the flag where this fails."""
    size = float(text)
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return size


def import_model(args: argparse.Namespace) -> None:
    """Writes a model directory of ours."""
    found = weights.find(args.model, args.adapter)
    _, abstract = models.abstract(found.config)
    flat = flatten(abstract)
    _check(found, flat)
    stored = {key: found.source.slice(key).get_dtype() for key in found.source.keys()}
    dtypes, narrow = _leaf_dtypes(found, flat, stored, args.dtype)
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtypes[path]))
        for path, leaf in flat.items()
    }
    used = {key for rule in found.key_map.rules for key in hf.keys_of(rule, flat[rule.ours].shape)}
    copies = sorted({copy for copy, _ in found.key_map.copies} & stored.keys())
    unused = sorted(stored.keys() - used - set(copies))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in wanted.values())
    started = time.monotonic()
    with _new_directory(args.output) as scratch:
        with _progress(total, "reading") as advance:
            params = hf.fill(found.source, found.key_map, unflatten(wanted), progress=advance)
        rest = {key: found.source.slice(key)[...] for key in unused}
        print(f"writing {total / 1e9:.2f} GB ...", flush=True)
        base = None if found.changes else found.base_name
        notes = {"base": base, "narrow": narrow, "copies": copies}
        checkpoint.write_model(scratch, params, rest, notes)
        _write_files(found, scratch, args.dtype)
    _say_done(args.output, len(stored), total, started)


def _check(found: weights.Weights, flat) -> None:
    """Raises unless the tensors are those of the model, in dtypes that can be held."""
    hf.check(found.source, found.key_map, flat)
    kinds = {key: found.source.slice(key).get_dtype() for key in found.source.keys()}
    strange = [f"{key} as {kind}" for key, kind in kinds.items() if kind not in hf_write.NAMES]
    if strange:
        raise UserError(f"{found.name}: cannot hold {hf.listed('tensors', sorted(strange))}")


def _leaf_dtypes(found, flat, stored: dict[str, str], dtype: str | None):
    """Returns the dtype of every parameter, and keys whose tensors are narrower than that."""
    dtypes, narrow = {}, {}
    for rule in found.key_map.rules:
        keys = hf.keys_of(rule, flat[rule.ours].shape)
        kinds = {stored[key] for key in keys}
        if dtype is None and "F64" in kinds:
            raise UserError(f"{found.name}: {keys[0]} is stored as F64; give --dtype float32")
        # f16 and bf16 have no common dtype below f32.
        whole = hf_write.NAMES[kinds.pop()] if len(kinds) == 1 else "float32"
        dtypes[rule.ours] = dtype or whole
        if dtype is None:
            narrow |= {k: stored[k] for k in keys if hf_write.NAMES[stored[k]] != whole}
    return dtypes, narrow


def export_model(args: argparse.Namespace) -> None:
    """Writes a Hugging Face directory, adapters merged."""
    found = weights.find(args.model, args.adapter)
    graphdef, abstract = models.abstract(found.config)
    model, flat = nnx.merge(graphdef, abstract), flatten(abstract)
    _check(found, flat)
    tensors = list(_pending(found, flat, args.dtype))
    if args.text_only:
        found, tensors = text_side.of(found, tensors)
    total = sum(tensor.nbytes for tensor in tensors)
    started = time.monotonic()
    with _new_directory(args.output) as scratch:
        with _progress(total, "writing") as advance:
            shard_bytes = int(args.shard_gb * 1e9)
            hf_write.write(scratch, tensors, shard_bytes=shard_bytes, progress=advance)
        _write_files(found, scratch, args.dtype)
        if args.text_only:
            text_side.write_files(scratch, found.config)
        model_card.write(scratch, found, pooling=model.pooling, width=model.embedding_width)
    _say_done(args.output, len(tensors), total, started)


def _pending(found: weights.Weights, flat, dtype: str | None) -> Iterator[hf_write.Pending]:
    """Yields all tensors: those of the rules in their order, then the others."""
    keys = [key for rule in found.key_map.rules for key in hf.keys_of(rule, flat[rule.ours].shape)]
    others = sorted(found.source.keys() - set(keys))
    for key in keys + others:
        tensor = found.source.slice(key)
        stored = hf_write.NAMES[tensor.get_dtype()]
        wanted = dtype if dtype and tensor.get_dtype() in _FLOATS else stored
        read = functools.partial(_converted, tensor, wanted)
        yield hf_write.Pending(key, tuple(tensor.get_shape()), wanted, read)


def _converted(tensor: hf.Tensor, dtype: str) -> np.ndarray:
    return tensor[...].astype(jnp.dtype(dtype), copy=False)


def export_adapters(args: argparse.Namespace) -> None:
    """Writes what a run trained, and the runs that it started from, as one PEFT adapter."""
    found = weights.find(args.model)
    if not found.changes:
        raise UserError(f"{args.model} is no training run; it has no adapters")
    adapter = functools.reduce(peft.join, found.changes)
    if not adapter.low_rank:
        raise UserError(f"{args.model} trained no adapters; export the model instead")
    started = time.monotonic()
    with _new_directory(args.output) as scratch:
        base_name = args.base or found.base_name
        peft.write(scratch, adapter, found.base, base_name=base_name, key_map=found.key_map)
        _write_preparation(found, scratch)
    if checkpoint.is_model(base_name):
        print(f"{base_name} is a directory of ours: peft needs an export of it; see --base")
    total = sum(change.a.nbytes + change.b.nbytes for change in adapter.low_rank.values())
    total += sum(value.nbytes for value in adapter.replaced.values())
    _say_done(args.output, 2 * len(adapter.low_rank) + len(adapter.replaced), total, started)


def _check_output(output: str) -> None:
    """Raises unless the output is new or empty."""
    path = pathlib.Path(output).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{output} is there already; name a new directory or remove it")


@contextlib.contextmanager
def _new_directory(output: str) -> Iterator[pathlib.Path]:
    """Gives a scratch directory that becomes `output` when all went well.

    Raises:
      UserError: it cannot be written there.
    """
    path = pathlib.Path(output).expanduser().absolute()
    scratch = path.parent / f".{path.name}.part"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    try:
        yield scratch
        if path.exists():
            path.rmdir()
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_files(found: weights.Weights, target: pathlib.Path, dtype: str | None) -> None:
    """Writes what belongs to a model beside its weights; config.json may get another dtype."""
    source = found.directory
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if _COPIED.fullmatch(path.name) and not _NOT_COPIED.fullmatch(path.name):
            shutil.copyfile(path, target / path.name)
    pooling = source / "1_Pooling" / "config.json"  # of sentence-transformers
    if pooling.is_file():
        (target / "1_Pooling").mkdir()
        shutil.copyfile(pooling, target / "1_Pooling" / "config.json")
    _write_preparation(found, target)
    config = source / "config.json"
    if dtype is None:
        shutil.copyfile(config, target / "config.json")
        return
    content = _with_dtype(hf.read_json(config), dtype)
    if not {"dtype", "torch_dtype"} & content.keys():
        content["dtype"] = dtype
    _write_json(target / "config.json", content)


def _write_preparation(found: weights.Weights, target: pathlib.Path) -> None:
    if found.preparation:
        _write_json(target / weights.PREPARATION_FILE, found.preparation)


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _with_dtype(config: dict, dtype: str) -> dict:
    """Returns the configuration with every dtype that it names, its parts' too, changed."""
    changed = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            value = dtype
        changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed


@contextlib.contextmanager
def _progress(total: int, title: str) -> Iterator[Callable[[int, str], None]]:
    """Gives a function of the bytes done and the key at hand."""
    with report.Progress(round(total / 1e6), title, unit="megabyte") as progress:
        yield lambda done, key: progress.update(round(done / 1e6), key)
        progress.update(round(total / 1e6))


def _say_done(output: str, tensors: int, size: int, started: float) -> None:
    seconds = max(time.monotonic() - started, 1e-3)
    rate = f"{size / 1e9 / seconds:.2f} GB/s"
    print(f"done: {output}, {tensors} tensors, {size / 1e9:.2f} GB in {seconds:.0f} s ({rate})")


if __name__ == "__main__":
    runtime.run_entry(main)
