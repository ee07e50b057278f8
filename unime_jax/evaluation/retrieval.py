"""Runs zero-shot retrieval: Flickr30K, COCO, ShareGPT4V, Urban1K, SugarCrepe."""

import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from unime_jax import metrics, weights
from unime_jax.benchmarks import caption_retrieval, sugarcrepe
from unime_jax.config import check
from unime_jax.data import caption_sets
from unime_jax.data.eval_items import Items
from unime_jax.evaluation import checks, examples, hosts, opening, retrieval_report
from unime_jax.evaluation.encode import Encoder
from unime_jax.types import UserError

# Where SugarCrepe's images (COCO's val2017) and ShareGPT4V's may be, from config.images or beside
# the set: the first directory that has the first image is taken.
_PLACES = ("", "val2017", "coco/val2017", "images", "train_images", "images/val2017")

# Of a set: its images and captions, or SugarCrepe's rows by file.
Data = caption_sets.CaptionSet | dict[str, caption_sets.Triples]


def validate(config) -> None:
    """Checks the configuration before any work."""
    checks.common(config, "that holds the sets")
    caption_retrieval.choose(config.sets)
    check(not config.before, f"config.before={config.before}: is for MMEB; see `evaluate compare`")


def run(config) -> dict[str, Any]:
    """Measures what `config` names and returns what report.json holds."""
    found = weights.find(config.model.path)
    settings = opening.settings_of(found, config, benchmark="retrieval")
    items, sets, problems = read(config)
    sets = hosts.same_sets(sets)
    encoder = opening.open_encoder(config, found, list(items), settings)
    return measure(config, encoder, items, sets, problems, settings)


def read(config) -> tuple[Items, dict[str, Data], dict[str, str]]:
    """Reads the sets that are there; returns them and what is wrong with the others."""
    root = pathlib.Path(config.data.path).expanduser()
    items, sets, problems = Items(), {}, {}
    for each in caption_retrieval.choose(config.sets):
        folder = caption_sets.find_folder(root, each.folders)
        if folder is None and caption_sets.is_named(root, each.folders):
            folder = root  # the directory of one set was given
        try:
            if folder is None:
                raise UserError(f"no directory {' or '.join(each.folders[:2])} in {root}")
            sets[each.name] = _READERS[each.name](config, root, folder, items, problems)
        except UserError as error:
            problems[each.name] = str(error)
    if not sets:
        lines = "; ".join(problems.values())
        raise UserError(f"config.data.path={config.data.path}: none of the sets is there ({lines})")
    return items, sets, problems


def _read_parquet(config, root, folder, items, problems) -> Data:
    return caption_sets.read_parquet(folder, items, limit=config.limit)


def _read_sharegpt4v(config, root, folder, items, problems) -> Data:
    first = caption_sets.first_image(folder)
    images = _images(config, root, folder, first)
    return caption_sets.read_sharegpt4v(
        folder, images, items, limit=config.limit, image_root=config.image_root
    )


def _read_urban1k(config, root, folder, items, problems) -> Data:
    return caption_sets.read_urban1k(
        folder, items, limit=config.limit, image_root=config.image_root
    )


def _read_sugarcrepe(config, root, folder, items, problems) -> Data:
    folder = folder / "data" if (folder / "data").is_dir() else folder
    found, images = {}, None
    for name in sugarcrepe.FILES:
        path = folder / f"{name}.json"
        try:
            if not path.is_file():
                raise UserError(f"{path}: no such file")
            if images is None:
                images = _images(config, root, folder, caption_sets.first_filename(path))
            found[name] = caption_sets.read_sugarcrepe(
                path, images, items, limit=config.limit, image_root=config.image_root
            )
        except UserError as error:
            problems[f"sugarcrepe {name}"] = str(error)
    if not found:
        raise UserError(f"{folder}: none of {', '.join(sugarcrepe.FILES)} in it")
    return found


_READERS: dict[str, Callable[..., Data]] = {
    "flickr30k": _read_parquet,
    "coco": _read_parquet,
    "sharegpt4v": _read_sharegpt4v,
    "urban1k": _read_urban1k,
    "sugarcrepe": _read_sugarcrepe,
}


def _images(config, root: pathlib.Path, folder: pathlib.Path, first: str) -> pathlib.Path:
    """Returns where image paths start: a directory that has the first, else the likeliest."""
    given = [pathlib.Path(config.images).expanduser()] if config.images else []
    bases = [*given, folder, folder.parent, root]
    for base in bases:
        for place in _PLACES:
            if os.path.isfile(base / place / first):  # False as well for names no file can have
                return base / place
    return bases[0]


def measure(
    config,
    encoder: Encoder,
    items: Items,
    sets: dict[str, Data],
    problems: dict[str, str],
    settings: opening.Settings,
) -> dict[str, Any]:
    """Embeds and scores set by set; whatever ends it, the finished sets are in the report."""
    started = time.perf_counter()
    print(f"{len(sets)} sets, {encoder.describe()}", flush=True)
    page = retrieval_report.Page(config, settings, problems)
    gallery = examples.Gallery(items)
    wanted = {name: _wanted(data) for name, data in sets.items()}

    def score(name: str) -> None:
        data = sets[name]
        if isinstance(data, dict):
            page.add_files({file: _score_file(rows, encoder) for file, rows in data.items()})
        else:
            page.add(name, _score(name, data, encoder, gallery), len(data.images))
        page.note(name, encoder.problems(items, wanted[name]))

    return page.fill(encoder, wanted, gallery, score, lambda: time.perf_counter() - started)


def _wanted(data: Data) -> np.ndarray:
    if isinstance(data, dict):
        parts = [side for t in data.values() for side in (t.images, t.captions, t.negatives)]
        return np.unique(np.concatenate(parts))
    return np.unique(np.concatenate([data.images, data.captions]))


def _score(
    name: str, data: caption_sets.CaptionSet, encoder: Encoder, gallery: examples.Gallery
) -> dict[str, caption_retrieval.Outcome]:
    images, captions = encoder.canonical[data.images], encoder.canonical[data.captions]
    found = {}
    ways = caption_retrieval.both_ways(images, captions, data.owner)
    for direction, (queries, candidates, rights) in ways.items():
        found[direction] = caption_retrieval.score(
            queries, candidates, rights, encoder.vectors, encoder.same, encoder.usable,
            metrics.first_places,
        )  # fmt: skip
        title = f"{retrieval_report.TITLES[name]} {retrieval_report.SHORT[direction]}"
        gallery.take(title, examples.of_captions(title, found[direction]), encoder)
    return found


def _score_file(rows: caption_sets.Triples, encoder: Encoder) -> sugarcrepe.Outcome:
    sides = (encoder.canonical[side] for side in (rows.images, rows.captions, rows.negatives))
    return sugarcrepe.score(*sides, encoder.vectors, encoder.same, encoder.usable)
