"""Steps of the published models at full size, random weights: what `run.py --device gpu` times.

Batches have MMEB's (or NLI's) mixture of lengths and images as `planning.composition` draws it.
Those of 1024 pairs are ours alone, for they take minutes; beside PyTorch the same mixture is
smaller, as both sides are then on one card. The same cases exist in a tiny size that runs on CPU.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import subprocess
from typing import Any

from cases import Case, Mixture

ROOT = pathlib.Path(__file__).resolve().parents[2]
LARGE = 100.0  # GB of a card from which on chunks are larger


@dataclasses.dataclass(frozen=True)
class Full:
    """A case at full size.

    Attributes:
      config: configuration file, for all that is not said here.
      backbone: one of `planning.backbones`.
      rows: of a batch (pairs, or sentences in stage 1); 0: the configuration's.
      chunks: rows at a time, on cards of 80 GB and on larger ones: by `plan --compile`, what they
        hold beside weights stays under what is left.
      more: further settings.
      torch: whether PyTorch's side runs too. transformers has no class for Phi-3.5-vision, nor our
        4-bit codes, and nobody can draw the same dropout.
      forward: embed rather than train.
      remat: in place of the configuration's; "": that one.
      one_pass: with its checkpoints PyTorch takes all rows in one pass, for they fit.
    """

    config: str
    backbone: str
    rows: int
    chunks: tuple[int, int]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    torch: bool = False
    forward: bool = False
    remat: str = ""
    one_pass: bool = False


FULL: dict[str, Full] = {
    "gpu_llava_pairs": Full("llava16_stage2", "llava16", 64, (4, 4), torch=True),
    "gpu_llava_dropout": Full(
        "llava16_stage2", "llava16", 64, (4, 4), {"train.adapters.dropout": 0.1}
    ),
    "gpu_llava_nf4": Full("llava16_stage2", "llava16", 64, (4, 4), {"train.quantize": "nf4"}),
    "gpu_llava_embed": Full("llava16_stage2", "llava16", 128, (16, 32), torch=True, forward=True),
    # Without 4-bit codes; by `plan --compile` 66 GiB of an H100 and 88 of an H200, 15 and 27 %
    # fewer operations than where all is computed again (27 GiB).
    "gpu_llava_stage1": Full(
        "llava16_stage1", "llava16", 0, (128, 192), torch=True, remat="dots", one_pass=True
    ),
    "gpu_phi": Full("phi35v_stage2", "phi35v", 0, (16, 64)),
    "gpu_llava": Full("llava16_stage2", "llava16", 0, (4, 16)),
}
NAMES = tuple(FULL)


def case(name: str) -> Case:
    """Returns the case of a name of NAMES, or of one with "_tiny" behind it."""
    from unime_jax.planning import backbones

    small, full = name.endswith("_tiny"), FULL[name.removesuffix("_tiny")]
    # bf16 weights, so that PyTorch's side has the same.
    settings = _settings(full.config) | {"train.quantize": None, "train.adapters.dropout": 0.0}
    settings |= {"train.chunk": full.chunks[card_memory() > LARGE], **full.more}
    settings["train.batch_size"] = full.rows or settings["train.batch_size"]
    settings["model.remat"] = full.remat or settings["model.remat"]
    if full.forward:
        settings["train.adapters.rank"] = 0  # merged, as whoever embeds has them
    # Random sentences are like no others: with each row's likeness to itself there is no loss.
    settings["loss.kl_diagonal"] = settings["stage"] != "distill"
    if small:
        from unime_jax import tiny

        config = tiny.CONFIGS[full.backbone]
        settings |= {"data.image_size": 56, "train.chunk": 4, "model.dtype": "float32"}
        settings |= {
            "train.batch_size": 24 if settings["stage"] == "distill" else 20,
            "data.max_tokens": 64,
        }
    else:
        config = {"phi35v": backbones.PHI35V, "llava16": backbones.LLAVA16}[full.backbone]
    stage = settings.pop("stage")
    size = 0 if stage == "distill" else settings["data.image_size"]
    count, unit = settings["train.batch_size"], "sentences" if stage == "distill" else "pairs"
    words = [full.config, f"{2 * count} rows" if full.forward else f"{count} {unit}"]
    words += ["nf4"] if settings["train.quantize"] else []
    dropout = settings["train.adapters.dropout"]
    words += [f"dropout {dropout}"] if dropout else []
    if not full.forward:
        chunk, remat = settings["train.chunk"], settings["model.remat"]
        words += [f"chunks of {chunk}", f"remat {remat}"]
    title = ("embed, " if full.forward else "") + ", ".join(words)
    also = {"forward": full.forward, "torch": full.torch, "one_pass": full.one_pass}
    return Case(title, stage, config, None, size, settings, **also)


@functools.cache
def card_memory() -> float:
    """Returns the GB of the first card; 80 where there is none to ask."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return float(said.splitlines()[0]) * 2**20 / 1e9
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return 80.0


def _settings(name: str) -> dict[str, Any]:
    """Returns what a configuration file sets, flat."""
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = {}

    def walk(section, prefix):
        for key, value in section.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    walk(module.get_config().to_dict(), "")
    skipped = ("output", "model.path", "data.path", "teacher.", "optim.")
    return {key: value for key, value in found.items() if not key.startswith(skipped)}


def mixture(case: Case, settings: dict[str, Any]) -> Mixture:
    """Returns the groups of a batch: (rows, tokens of text, whether there is an image)."""
    import dataclasses

    from unime_jax.planning import abstract, backbones, composition

    model = abstract.model(settings, case.config, "xla")
    backbone = backbones.Backbone("", case.config, None)
    away = {**settings, "data": {**settings["data"], "path": ""}}
    found = composition.find(away, backbone, model)
    layout = composition._layout(away, model) if case.image_size else None
    sides = {}
    for side in ("query", "target", "negative"):
        sides[side] = tuple(
            (rows, tokens - (layout.positions if tiles else 0), tiles > 0)
            for rows, tokens, tiles in getattr(found, side)
        )
    known = {field.name for field in dataclasses.fields(Mixture)}
    return Mixture(**{side: groups for side, groups in sides.items() if side in known})
