"""Shows the tokens that models would say next where they embed (UniME, Fig. 6).

    python -m unime_jax.inspect --model DIR --input items.jsonl
    python -m unime_jax.inspect --model student/ --model runs/stage1 --input items.jsonl -k 10

An embedding is the hidden state behind "... in one word:". Its language-model head turns that state
into probabilities of the next token: what the embedding says in words, before training and after.
--model is anything that `embed` takes and that has a head; give it several times to put models side
by side. --input is read as by `embed`: lines of {"text": ..., "image": path}, a Parquet file, a
folder of pictures or - for stdin. Prints a table for the first rows and writes inspect.json (all
rows) and inspect.png to --output. Rows that no model can read are named, one line each.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from unime_jax import arguments, embedder, predictions, report, runtime, weights
from unime_jax.data import items, pictures, prompts
from unime_jax.data.stream import Item
from unime_jax.predictions import Prediction
from unime_jax.types import UserError


@dataclasses.dataclass
class Inspected:
    """A model and what it predicts.

    Attributes:
      name: of its column.
      about: its path and how it was asked.
      found: number of a row -> its tokens, the most probable first.
    """

    name: str
    about: dict[str, str | int | None]
    found: dict[int, list[Prediction]]


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv[1:])
    if args.k < 1 or args.show < 1:
        raise UserError("-k and --show are counts: give 1 or more")
    output = pathlib.Path(args.output).expanduser()
    runtime.check_output(output, "--output")
    names = _names(args.model, args.name)
    found = [weights.find(path) for path in args.model]  # all are looked for before one is loaded
    source = items.Input(args.input, image_root=args.image_root)
    entries = list(source)
    if source.left_out:
        print(source.describe_left_out(), file=sys.stderr)
    runtime.start()
    faults = [(entry.row, "", entry.fault) for entry in entries if entry.fault]
    inspected = []
    if len(faults) < len(entries):
        for name, model in zip(names, found, strict=True):
            inspected.append(_inspect(name, model, entries, args, faults))
    _say_faults(faults)
    kept = [entry for entry in entries if any(entry.row in m.found for m in inspected)]
    if not kept:
        raise UserError(f"{args.input}: none of its {len(entries)} rows can be read")
    output.mkdir(parents=True, exist_ok=True)
    written = _write(output, args, kept, inspected, faults)
    shown = kept[: args.show]
    for entry in shown:
        print(f"\n{_title(entry)}\n\n{_table(entry.row, inspected).text()}")
    plot = _plot(output / "inspect.png", shown, inspected)
    if len(shown) < len(kept):
        print(f"\nand {len(kept) - len(shown)} more in {written}; --show N prints and draws N")
    print(f"\nwritten  {written}\nplot     {plot}")


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(prog="python -m unime_jax.inspect", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, action="append", help="directory of a model or run, or a hub id")
    add("--name", action="append", default=[], help="of each model's column (its directory's)")
    add("--input", required=True, help="file, folder, or - for stdin")
    add("--image-root", default="", help="no image outside of it is read (the input's folder)")
    add("--output", default="inspect", help="directory of what is written (%(default)s)")
    add("-k", type=int, default=10, help="tokens for each row (%(default)s)")
    add("--show", type=int, default=6, help="rows that are printed and drawn (%(default)s)")
    add("--instruction", help="put before every text")
    add(
        "--fusion",
        choices=embedder.FUSIONS,
        help="of image and text (as the model was trained); only together has one place to ask",
    )
    add(
        "--compute-dtype",
        choices=("auto", *embedder.DTYPES),
        default="auto",
        help="of the models; auto: float32 on CPUs, else bfloat16",
    )
    return parser


def _names(paths: Sequence[str], given: Sequence[str]) -> list[str]:
    """Returns a name for each model: the ends of the paths, as long as it takes to tell them."""
    if given:
        if len(given) != len(paths) or len(set(given)) < len(given):
            raise UserError(
                f"{len(given)} --name for {len(paths)} --model: one for each, all different"
            )
        return list(given)
    parts = [pathlib.Path(path).expanduser().absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("--model: the same directory twice")


# ---------------------------------------------------------------- predictions


def _inspect(
    name: str,
    found: weights.Weights,
    entries: Sequence[items.Entry],
    args: argparse.Namespace,
    faults: list[tuple[int, str, str]],
) -> Inspected:
    """Loads a model and asks it; what it cannot read goes to `faults` as (row, model, reason)."""
    import jax

    dtype = args.compute_dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = embedder.load_weights(found, dtype=dtype)
    try:
        vocabulary = predictions.vocabulary_of(model)
    except UserError as error:
        raise UserError(f"{found.name}: {error}") from None
    if args.k > vocabulary:
        raise UserError(f"-k {args.k}: {found.name} has {vocabulary} tokens")

    readable = [entry for entry in entries if not entry.fault]
    told: dict[int, list[Prediction]] = {}
    with report.Progress(len(readable), name, unit="row") as progress:

        def bad(row: int, reason: str) -> None:
            faults.append((row, name, reason))
            progress.advance()

        pending = _items(readable, args.fusion or model.fusion, bad)
        for row, tokens in predictions.predict(
            model, pending, k=args.k, instruction=args.instruction, bad=bad
        ):
            told[row] = tokens
            progress.advance()
    about = {
        "path": found.name,
        "fingerprint": found.fingerprint,
        "prompt": prompts.TEMPLATES[model.preprocessor.prompt].text,
        "vocabulary": vocabulary,
        "dtype": dtype,
    }
    return Inspected(name, about, told)


def _items(entries: Sequence[items.Entry], fusion: str, bad) -> Iterator[Item]:
    for entry in entries:
        if fusion == "sum" and entry.text is not None and entry.image is not None:
            bad(
                entry.row,
                "this model embeds image and text as a sum of two vectors, which no head reads: "
                "give them as two rows, or --fusion together",
            )
        else:
            yield Item(entry.row, entry.text, entry.image)


def _say_faults(faults: Sequence[tuple[int, str, str]]) -> None:
    """Prints a line for each bad row and reason, with the models that it holds for."""
    lines: dict[tuple[int, str], list[str]] = {}
    for row, name, reason in faults:
        lines.setdefault((row, " ".join(reason.split())), []).append(name)
    for (row, reason), names in sorted(lines.items()):
        models = f" ({', '.join(names)})" if any(names) else ""
        print(f"row {row}{models}: {reason}", file=sys.stderr)


# ---------------------------------------------------------------- what is shown


def _title(entry: items.Entry) -> str:
    parts = [f"row {entry.row}"]
    if entry.id != str(entry.row):
        parts.append(entry.id)
    if entry.image is not None and entry.label != entry.id:
        parts.append(entry.label)
    if entry.text is not None:
        text = " ".join(entry.text.split())
        parts.append(f"“{text[:100]}…”" if len(text) > 100 else f"“{text}”")
    return "  ".join(parts)


def _table(row: int, inspected: Sequence[Inspected]) -> report.Table:
    """Has a line for each rank and two columns for each model."""
    header = ["rank", *(word for model in inspected for word in (model.name, "%"))]
    count = max(len(model.found.get(row, ())) for model in inspected)
    lines = []
    for rank in range(count):
        line: list[int | str | float | None] = [rank + 1]
        for model in inspected:
            tokens = model.found.get(row)
            if tokens is None:
                line += [None, None]
            else:
                line += [report.visible(tokens[rank].text), 100 * tokens[rank].probability]
        lines.append(line)
    return report.Table(header, lines, ("d", *["", ".2f"] * len(inspected)))


def _write(
    output: pathlib.Path,
    args: argparse.Namespace,
    kept: Sequence[items.Entry],
    inspected: Sequence[Inspected],
    faults: Sequence[tuple[int, str, str]],
) -> pathlib.Path:
    """Writes inspect.json."""
    rows = [
        {
            "row": entry.row,
            "id": entry.id,
            "text": entry.text,
            "image": entry.label or None,
            "predictions": {
                model.name: [dataclasses.asdict(token) for token in model.found[entry.row]]
                for model in inspected
                if entry.row in model.found
            },
        }
        for entry in kept
    ]
    content = {
        "k": args.k,
        "instruction": args.instruction,
        "models": {model.name: model.about for model in inspected},
        "rows": rows,
        "faults": [{"row": row, "model": name, "reason": why} for row, name, why in faults],
    }
    path = output / "inspect.json"
    report.replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def _plot(
    path: pathlib.Path, shown: Sequence[items.Entry], inspected: Sequence[Inspected]
) -> pathlib.Path:
    rows = [
        (
            " ".join((entry.text or "").split()),
            None if entry.image is None else np.asarray(pictures.load_rgb(entry.image)),
        )
        for entry in shown
    ]
    columns = {
        model.name: [
            [(token.text, token.probability) for token in model.found[entry.row]]
            if entry.row in model.found
            else None
            for entry in shown
        ]
        for model in inspected
    }
    return report.plot_token_bars(rows, columns, path)


if __name__ == "__main__":
    runtime.run_entry(main)
