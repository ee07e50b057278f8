"""Steps of the published models at full size, random weights: what `run.py --device gpu` times.

Batches are as the configurations have them, with MMEB's (or NLI's) mixture of lengths and images as
`planning.composition` draws it. The same cases exist in a tiny size that runs on CPU.
"""

import importlib.util
import pathlib
from typing import Any

from cases import Case, Mixture

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Name -> configuration, backbone, and what differs: bf16 weights, so that PyTorch's side has the
# same; no dropout, which nobody can draw alike; rows at a time that fit 80 GB beside them.
FULL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpu_phi": ("phi35v_stage2", "phi35v", {"train.chunk": 16}),
    "gpu_llava": ("llava16_stage2", "llava16", {"train.chunk": 8}),
    "gpu_llava_nf4": ("llava16_stage2", "llava16", {"train.chunk": 8, "train.quantize": "nf4"}),
    "gpu_llava_stage1": ("llava16_stage1", "llava16", {"train.chunk": 96}),
    "gpu_llava_embed": ("llava16_stage2", "llava16", {"train.chunk": 32, "train.batch_size": 256}),
}
NAMES = tuple(FULL)


def case(name: str) -> Case:
    """Returns the case of a name of NAMES, or of one with "_tiny" behind it."""
    from unime_jax.planning import backbones

    small = name.endswith("_tiny")
    config_name, backbone, changes = FULL[name.removesuffix("_tiny")]
    settings = _settings(config_name)
    settings |= {"train.quantize": None, "train.adapters.dropout": 0.0, **changes}
    # Random sentences are like no others: with each row's likeness to itself there is no loss.
    settings["loss.kl_diagonal"] = settings["stage"] != "distill"
    if small:
        from unime_jax import tiny

        config = tiny.CONFIGS[backbone]
        settings |= {"data.image_size": 56, "train.chunk": 4, "model.dtype": "float32"}
        settings |= {"train.batch_size": 24 if "stage1" in name else 20, "data.max_tokens": 64}
    else:
        config = {"phi35v": backbones.PHI35V, "llava16": backbones.LLAVA16}[backbone]
    stage = settings.pop("stage")
    size = 0 if stage == "distill" else settings["data.image_size"]
    title = f"{config_name}, {settings['train.batch_size']} rows"
    title += ", nf4" if settings["train.quantize"] else ""
    forward = name.removesuffix("_tiny").endswith("_embed")
    return Case(
        f"embed, {title}" if forward else title,
        stage,
        config,
        None,
        size,
        settings,
        forward=forward,
        # transformers has no class for Phi-3.5-vision, nor our 4-bit codes.
        torch=backbone != "phi35v" and not settings["train.quantize"],
    )


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
