"""Embeds files of any size: texts, pictures and both together in, vectors out.

    python -m unime_jax.embed --model DIR --input items.jsonl --output vectors.npz
    python -m unime_jax.embed search --index vectors.npz --text "a red hat" -k 10

--input is a .jsonl file (lines of {"id": ..., "text": ..., "image": path}, any of them left out,
paths relative to the file), a .parquet file with such columns (images as paths or as encoded
bytes), a folder of pictures, or - for JSON lines on stdin. --output is a .npz, .npy, .parquet or
.safetensors file: vectors in the order of the input, with the ids. Rows that cannot be embedded are
left out and listed with their reasons in OUTPUT.errors.jsonl.

Memory does not grow with the input. Killed or interrupted, the same command goes on where it
stopped; after Ctrl-C the output holds what is done so far. All devices of this machine share the
rows; several processes, told of each other by --coordinator=HOST:PORT --processes=N --process=I or
by the cluster, do so as well: each reads all lines or Parquet rows, and opens its own pictures.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np

from unime_jax import (
    __version__,
    allocator,
    arguments,
    embed_job,
    embedder,
    report,
    runtime,
    search,
    sharding,
    weights,
)
from unime_jax.data import items, prompts, vector_files
from unime_jax.data.stream import Item, Stream
from unime_jax.types import UserError


def main(argv: list[str]) -> None:
    if argv[1:2] == ["search"]:
        search.run(search.parser().parse_args(argv[2:]))
    else:
        embed(_parser().parse_args(argv[1:]))


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(prog="python -m unime_jax.embed", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="directory of a model or run, or a hub id")
    add("--input", required=True, help="file, folder, or - for stdin")
    add("--output", required=True, help="file of vectors; its name says the format")
    add("--instruction", help="put before every text")
    add(
        "--dim",
        type=search.positive,
        help="keep the first numbers of each vector, scaled to length 1",
    )
    add("--dtype", choices=tuple(vector_files.DTYPES), default="f32", help="of the output")
    add("--fusion", choices=embedder.FUSIONS, help="of image and text (as the model was trained)")
    add(
        "--compute-dtype",
        choices=("auto", *embedder.DTYPES),
        default="auto",
        help="of the model; auto: float32 on CPUs, else bfloat16",
    )
    add(
        "--fsdp",
        type=search.positive,
        default=1,
        help="devices that share one copy of the parameters (%(default)s)",
    )
    keys = items.Keys()
    add("--id-key", default=keys.id, help="column or key of the ids (%(default)s)")
    add("--text-key", default=keys.text, help="of the texts (%(default)s)")
    add("--image-key", default=keys.image, help="of the images (%(default)s)")
    add("--image-root", default="", help="no image outside of it is read (the input's folder)")
    return parser


# ---------------------------------------------------------------- embedding


def embed(args: argparse.Namespace) -> None:
    """Writes the vectors of an input."""
    import jax

    allocator.bound_arenas()
    output = pathlib.Path(args.output).expanduser()
    vector_files.kind_of(output)
    runtime.check_output(output.parent, "--output")
    keys = items.Keys(args.id_key, args.text_key, args.image_key)
    source = items.Input(args.input, keys, image_root=args.image_root)
    runtime.start()
    process, processes = jax.process_index(), jax.process_count()
    found = weights.find(args.model)
    settings = _settings(args, found, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists() and not embed_job.directory_of(output).is_dir():
        _check_finished(output, settings, source)
        return
    total = source.count()  # what is wrong with the input is told before the model is loaded
    started = time.perf_counter()
    model = embedder.load_weights(found, dtype=settings["compute_dtype"], mesh=_mesh(args.fsdp))
    del found  # with the files that it holds mapped, which count as memory
    width = model.embedding_width
    if args.dim is not None and args.dim > width:
        raise UserError(f"--dim {args.dim}: the vectors of {args.model} have {width} numbers")
    dtype = vector_files.DTYPES[args.dtype]
    job = embed_job.open_job(
        output,
        settings,
        width=args.dim or width,
        dtype=dtype,
        process=process,
        processes=processes,
    )
    with job as job:
        before = job.finished
        stopped = _run(model, source, total, job, settings, process, processes)
        if processes > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("unime_jax.embed")
        if process == 0:
            about = job.write(complete=stopped is None)
            if stopped is None:
                job.remove()
            _say(_summary(args, about, job.finished - before, time.perf_counter() - started))
    if stopped is not None:
        stopped.leave()
    if process == 0:
        _check_any(output, about)


def _settings(
    args: argparse.Namespace, found: weights.Weights, source: items.Input
) -> dict[str, Any]:
    """Returns what the vectors depend on besides the rows; stored in the output."""
    import jax

    compute_dtype = args.compute_dtype
    if compute_dtype == "auto":
        compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    path = pathlib.Path(args.model).expanduser()
    preparation = found.preparation
    prompt = preparation.get("prompt") or prompts.name_for(found.config["model_type"])
    return {
        "model": str(path.resolve()) if path.is_dir() else str(args.model),
        "fingerprint": found.fingerprint,
        "prompt": prompt,
        "wording": prompts.digest(prompt),
        "fusion": args.fusion or preparation.get("fusion") or embedder.FUSIONS[0],
        "instruction": args.instruction or None,
        "dim": args.dim,
        "dtype": args.dtype,
        "compute_dtype": compute_dtype,
        "input": args.input if source.name == "-" else str(source.path.resolve()),
        "folder": str(source.folder.resolve()),
        "image_root": str(pathlib.Path(args.image_root).expanduser().resolve())
        if args.image_root
        else "",
        "keys": [args.id_key, args.text_key, args.image_key],
        "unime_jax": __version__,
    }


def _mesh(fsdp: int):
    """Returns the devices of this process, None for one."""
    import jax

    devices = jax.local_devices()
    if len(devices) % fsdp:
        raise UserError(f"--fsdp {fsdp} does not divide the {len(devices)} devices of this machine")
    if len(devices) == 1:
        return None
    return sharding.make_mesh(data=len(devices) // fsdp, fsdp=fsdp, devices=devices)


def _check_finished(output: pathlib.Path, settings: dict[str, Any], source: items.Input) -> None:
    """Says that there is nothing to do.

    Raises:
      UserError: the output is something else than this command would write, or lacks vectors.
    """
    about = vector_files.read_about(output)
    if not about:
        raise UserError(f"{output} is there already and not written by this command; remove it")
    embed_job.check_settings(output, about, settings)
    log = embed_job.ItemLog(output, writes=False)
    for entry in source:
        log.add(entry)
    if log.digest != about["items"]:
        raise UserError(
            f"{output} was made from other rows than {source.name} has now: remove it, or choose "
            "another --output"
        )
    if not about["complete"]:
        raise UserError(
            f"{output} holds {about['vectors']} vectors of a job that was stopped, and "
            f"{embed_job.directory_of(output)}, which it would go on from, is gone: remove {output}"
        )
    embed_job.check_root(output, about, settings)
    _check_any(output, about)
    embed_job.sweep(output)
    bad = f"; bad rows: {about['bad_rows']}, see {embed_job.errors_of(output)} ("
    bad += f"remove {output} to try them again)"
    _say(f"{output}: all {about['vectors']} vectors are there{bad * bool(about['bad_rows'])}")


def _check_any(output: pathlib.Path, about: dict[str, Any]) -> None:
    """Raises where there were no rows or none of them could be embedded."""
    if not about["rows"]:
        raise UserError(f"--input {about['input']}: no rows came")
    if not about["vectors"]:
        raise UserError(
            f"none of the {about['rows']} rows could be embedded: {embed_job.errors_of(output)} "
            "says why"
        )


def _run(
    model: embedder.Embedder,
    source: items.Input,
    total: int | None,
    job: embed_job.Job,
    settings: dict[str, Any],
    process: int,
    processes: int,
) -> runtime.StopRequest | None:
    """Embeds what is not done; returns what told it to stop, if something did."""
    if process == 0 and source.left_out:
        _say(source.describe_left_out())
    is_cut = False  # rows were left unread
    stop = runtime.StopRequest()
    names: dict[int, str] = {}  # ids of the rows on their way
    halves: dict[int, np.ndarray] = {}  # of rows that are the sum of two vectors

    def pending() -> Iterator[Item]:
        nonlocal is_cut
        for entry in source.read(stopped=lambda: stop.signal is not None):
            if stop.signal is not None:
                break
            job.log.add(entry)
            if entry.row % processes != process or job.is_done(entry.row):
                continue
            if entry.fault:
                job.fail(entry.row, entry.id, entry.fault)
                continue
            names[entry.row] = entry.id
            yield from _parts(entry, settings["fusion"])
        is_cut = stop.signal is not None
        if not is_cut:
            job.log.end()

    def fail(key: tuple[int, str], reason: str) -> None:
        halves.pop(key[0], None)
        if key[0] in names:  # not the other half of a row that failed
            job.fail(key[0], names.pop(key[0]), reason)

    stream = Stream(model.preprocessor, pending(), instruction=settings["instruction"], bad=fail)
    with contextlib.ExitStack() as stack:
        if processes == 1:  # of several each ends at once: what is done is on the disk
            stack.enter_context(stop)
        share = None if total is None else -(-total // processes)
        before = job.finished - job.finished // processes  # what others have done
        progress = None
        if process == 0:
            start = job.finished - before if share is None else min(job.finished - before, share)
            progress = report.Progress(share, "embedding", start=start, unit="row")
            stack.enter_context(progress)

        def show() -> None:
            if progress is not None:
                done = job.finished - before
                failed = f"{job.failed} bad" if job.failed else ""
                progress.update(done if share is None else min(done, share), failed)

        for keys, vectors in model.run(stream):
            rows, vectors = _joined(keys, vectors, halves, names)
            rows, vectors = _finite(rows, _first(vectors, job.width), fail)
            job.add(rows, vectors)
            for row in rows:
                names.pop(row)
            show()
            if stop.signal is not None:
                return stop
        show()
    if process == 0 and stream.positions:
        _say(f"{stream.padded_share:.1%} of the positions were padding")
    return stop if is_cut else None


def _parts(entry: items.Entry, fusion: str) -> Iterator[Item]:
    """Yields what is embedded of a row: itself, or text and image for the sum of the two."""
    if fusion == "sum" and entry.text is not None and entry.image is not None:
        yield Item((entry.row, "text"), entry.text)
        yield Item((entry.row, "image"), image=entry.image)
    else:
        yield Item((entry.row, ""), entry.text, entry.image)


def _joined(
    keys: list[Hashable],
    vectors: np.ndarray,
    halves: dict[int, np.ndarray],
    names: dict[int, str],
) -> tuple[list[int], np.ndarray]:
    """Returns the rows that are whole; halves wait for each other in `halves`."""
    rows, found = [], []
    for (row, part), vector in zip(keys, vectors, strict=True):
        if row not in names:  # its other half failed
            continue
        if part and row not in halves:
            halves[row] = vector
            continue
        if part:
            vector = vector + halves.pop(row)
            with np.errstate(invalid="ignore"):  # two that cancel out: told as not finite
                vector = vector / np.linalg.norm(vector)
        rows.append(row)
        found.append(vector)
    return rows, np.array(found, np.float32).reshape(len(rows), vectors.shape[1])


def _first(vectors: np.ndarray, width: int) -> np.ndarray:
    """Returns the first numbers of unit vectors, scaled to length 1."""
    if width == vectors.shape[1]:
        return vectors
    vectors = vectors[:, :width]
    with np.errstate(invalid="ignore"):  # a length of 0 is told as a vector that is not finite
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _finite(
    rows: list[int], vectors: np.ndarray, fail: Callable[[tuple[int, str], str], None]
) -> tuple[list[int], np.ndarray]:
    """Returns the rows that can be compared with others; the rest has failed."""
    good = np.isfinite(vectors).all(axis=1)
    for place in np.flatnonzero(~good):
        fail((rows[place], ""), "the model gave no finite vector")
    return [row for row, fine in zip(rows, good, strict=True) if fine], vectors[good]


def _summary(args: argparse.Namespace, about: dict[str, Any], done: int, seconds: float) -> str:
    state = "done" if about["complete"] else "stopped"
    pace = f"{report.format_seconds(seconds)} ({done / max(seconds, 1e-3):.3g}/s)"
    rate = f"{done} row{'s' * (done != 1)} in {pace}"
    count = f"{about['vectors']} vector{'s' * (about['vectors'] != 1)}"
    lines = [f"{state}: {args.output}, {count} ({about['dtype']}); {rate}"]
    if about["bad_rows"]:
        errors = embed_job.errors_of(pathlib.Path(args.output))
        lines.append(f"bad rows: {about['bad_rows']}, see {errors}")
    if about["complete"] and about["vectors"]:
        lines.append(f'next: python -m unime_jax.embed search --index {args.output} --text "..."')
    if not about["complete"]:
        lines.append("the same command goes on from there")
    return "\n".join(lines)


def _say(text: str) -> None:
    """Prints, also where nobody reads any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    runtime.run_entry(main)
