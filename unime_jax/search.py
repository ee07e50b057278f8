"""Searches a file of vectors for what is nearest to a text, a picture, or both."""

import argparse
import contextlib
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from unime_jax import arguments, embedder, report, runtime, weights
from unime_jax.data import items, pictures, vector_files
from unime_jax.types import UserError


def positive(text: str) -> int:
    """Reads a number; argparse names the flag where this fails."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def parser() -> argparse.ArgumentParser:
    text = "Finds the rows of a file of vectors that are nearest to a text, a picture, or both."
    found = arguments.Parser(prog="python -m unime_jax.embed search", description=text)
    add = found.add_argument
    add("--index", required=True, help="what `python -m unime_jax.embed` wrote")
    add("--text", help="to look for")
    add("--image", help="path of a picture to look for")
    add("-k", type=positive, default=10, help="rows to find (%(default)s)")
    add("--model", help="where the model of the index is now (where it was)")
    add("--instruction", help="must be the index's, which is the default")
    add("--query-instruction", help="of the query alone, for models that tell queries by one")
    add("--sheet", help="PNG of the pictures found (INDEX.search.png)")
    return found


def run(args: argparse.Namespace) -> None:
    """Prints the nearest rows and draws their pictures."""
    _check(args)
    index = vector_files.read(pathlib.Path(args.index).expanduser())
    if not len(index.vectors):
        raise UserError(f"{args.index} holds no vectors")
    _check_sheet(args, index)
    runtime.start()
    query = _query(args, index.about)
    cosines, places = nearest(index.vectors, query, args.k)
    rows = []
    for rank, (cosine, place) in enumerate(zip(cosines, places, strict=True), 1):
        text, image = index.texts[place], index.images[place]
        id = str(index.ids[place])
        rows.append((rank, float(cosine), id, _short(text) or None, image if image != id else None))
    keep = [c for c in range(5) if c < 3 or any(row[c] is not None for row in rows)]
    header = ("", "cosine", "id", "text", "image")
    table = report.Table(
        [header[c] for c in keep], [[row[c] for c in keep] for row in rows], ("", ".3f")
    )
    print(table.text())
    if any(index.images[place] for place in places):
        try:
            print(f"pictures: {_draw(args, index, cosines, places)}")
        except OSError as error:
            if args.sheet:
                raise
            print(f"no sheet of the pictures: {error}; --sheet FILE.png names another place")


def _check(args: argparse.Namespace) -> None:
    """Tells what is missing or wrong before the model is loaded.

    Raises:
      UserError: what it is.
    """
    if args.text is None and args.image is None:
        raise UserError("search: give --text, --image or both")
    if args.text is not None and not args.text.strip():
        raise UserError("--text is empty: say what to look for")
    _faiss()
    if args.sheet:
        sheet = pathlib.Path(args.sheet).expanduser()
        runtime.check_output(sheet.parent, "--sheet")
        if sheet.suffix.lower() != ".png" or sheet.is_dir():
            raise UserError(f"--sheet={args.sheet}: the sheet is a file, FILE.png")
    if args.image == "":
        raise UserError("--image is empty: name a picture")
    if args.image is not None:
        try:
            pictures.load_rgb(args.image)
        except UserError as error:
            raise UserError(f"--image={error}") from None


def _sheet(args: argparse.Namespace) -> pathlib.Path:
    return pathlib.Path(args.sheet or f"{args.index}{items.SHEET}").expanduser()


def _place(index: vector_files.Vectors, name: str) -> str:
    return os.path.join(index.about["folder"], os.path.expanduser(name))


def _check_sheet(args: argparse.Namespace, index: vector_files.Vectors) -> None:
    """Raises `UserError` where the sheet would replace a picture of the user's."""
    sheet = _sheet(args)
    if not sheet.exists():
        return

    def is_sheet(path) -> bool:
        try:
            return os.path.samefile(path, sheet)
        except (OSError, ValueError):  # it is not there, or no name of a file
            return False

    what, names = "", filter(None, index.images)
    if not args.sheet and sheet.stat().st_nlink == 1:  # nobody links to it: it has one name
        names = (name for name in names if os.path.basename(name) == sheet.name)
    if args.image is not None and is_sheet(os.path.expanduser(args.image)):
        what = "the picture that is looked for"
    elif any(is_sheet(_place(index, name)) for name in names):
        what = f"a picture of {args.index}"
    if what:
        raise UserError(f"--sheet={sheet}: is {what}; name another file")


def _query(args: argparse.Namespace, about: dict[str, Any]) -> np.ndarray:
    """Embeds what is looked for with the model of the index.

    Raises:
      UserError: model or instruction are others than the index was made with.
    """
    if args.instruction is not None and (args.instruction or None) != about["instruction"]:
        raise UserError(
            f"{args.index} was made with the instruction {about['instruction']!r}, not "
            f"{args.instruction!r}; for one that only queries have give --query-instruction"
        )
    name = args.model or about["model"]
    if args.model is None and os.path.isabs(name) and not os.path.isdir(name):
        raise UserError(f"{name}, which made {args.index}, is not there: name it with --model")
    found = weights.find(name)
    if found.fingerprint != about["fingerprint"]:
        raise UserError(
            f"{args.index} was made with another model than {name} is (then {about['model']}): "
            "embed the rows again, or name that model with --model"
        )
    model = embedder.load_weights(found, dtype=about["compute_dtype"])
    instruction = args.query_instruction
    try:
        vector = model.embed(
            texts=None if args.text is None else [args.text],
            images=None if args.image is None else [args.image],
            instruction=about["instruction"] if instruction is None else instruction or None,
            fusion=about["fusion"],
        )[0]
    except UserError as error:
        raise UserError(f"search: {str(error).removeprefix('row 0: ')}") from None
    vector = vector[: about["dim"]]
    length = np.linalg.norm(vector)
    if not (np.isfinite(length) and length):
        raise UserError(f"{name} gave no finite vector for what is looked for")
    return vector / length


def _draw(args, index: vector_files.Vectors, cosines, places) -> pathlib.Path:
    """Draws the pictures among the rows found."""
    path = _sheet(args)
    pairs = zip(cosines.tolist(), places.tolist(), strict=True)
    hits = [(c, p) for c, p in pairs if index.images[p]]
    found = {p: _place(index, index.images[p]) for _, p in hits}
    # Of what an index names only files are opened, and shown alone where they are pictures.
    missing = {int(index.rows[p]): p for p, name in found.items() if not os.path.isfile(name)}
    found = {p: name for p, name in found.items() if os.path.isfile(name)}
    found |= _from_input(index.about, missing)

    def picture(place) -> np.ndarray | None:
        try:
            return np.asarray(pictures.load_rgb(found[place]))
        except (KeyError, UserError):
            return None

    words = [index.texts[p] or os.path.basename(index.images[p]) for _, p in hits]
    return report.plot_contact_sheet(
        [picture(p) for _, p in hits],
        [f"{1 + list(places).index(p)}   {c:.3f}" for c, p in hits],
        words,
        path,
        title=args.text or "",
        query=None if args.image is None else np.asarray(pictures.load_rgb(args.image)),
    )


def _from_input(about: dict[str, Any], rows: dict[int, int]) -> dict[int, bytes]:
    """Reads pictures that lie in the input itself, if that is still there."""
    if not rows or not os.path.isfile(about["input"]):
        return {}
    found = {}
    with contextlib.suppress(UserError, OSError):  # it is something else now
        for entry in items.Input(about["input"], items.Keys(*about["keys"])):
            if entry.row in rows and isinstance(entry.image, bytes):
                found[rows[entry.row]] = entry.image
            if entry.row >= max(rows):
                break
    return found


def _short(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 2] + " …"


def nearest(
    vectors: Float32[np.ndarray, "N E"], query: Float32[np.ndarray, "E"], k: int
) -> tuple[Float32[np.ndarray, "K"], Int64[np.ndarray, "K"]]:
    """Returns cosines and places of the k nearest of unit rows (all, if fewer), best first.

    The search is exact; rows that are not finite are never among them.

    Raises:
      UserError: FAISS is not installed.
    """
    faiss = _faiss()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    cosines, places = index.search(np.ascontiguousarray(query[None]), min(k, len(vectors)))
    found = places[0] >= 0
    return cosines[0][found], places[0][found].astype(np.int64)


def _faiss():
    try:
        import faiss
    except ImportError:
        raise UserError("search needs FAISS: pip install -e '.[search]'") from None
    return faiss
