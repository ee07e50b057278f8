"""Reads a checkpoint's image processor settings, and refuses what is not built."""

import json
import math
import pathlib
import sys
from typing import Any

from unime_jax.data.tiles import AnyResolution, PhiHD, Square, Transform
from unime_jax.types import ImageSpec, UserError

# Tiles are normalised on the device with CLIP's numbers.
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}
_BICUBIC = 3
_CROPS = 1024  # of an image: with more the longest row of any model is full
_EXPECTED = {
    "phi_hd": {**_CLIP},
    "llava_anyres": {
        **_CLIP,
        "do_resize": True,
        "do_center_crop": True,  # of tiles that have this size already
        "resample": _BICUBIC,
        "aspect_ratio_setting": "anyres",
    },
}

_LARGEST = sys.float_info.max  # JSON has integers that no float holds


def make_transform(spec: ImageSpec, directory: str | pathlib.Path, *, crops: int = 0) -> Transform:
    """Makes the image transform of a checkpoint.

    Args:
      spec: of its model.
      directory: may hold preprocessor_config.json (or processor_config.json).
      crops: most tiles of an image, for "phi_hd" alone; 0: the checkpoint's own number.

    Raises:
      UserError: a setting that would change the pixels and is not built.
    """
    if crops and spec.kind != "phi_hd":
        raise UserError(
            f"image_crops={crops}: this model's images ({spec.kind}) are not cut into a number of "
            "crops; leave it 0"
        )
    if spec.kind == "grid":
        return Square(spec)
    if spec.kind not in _EXPECTED:
        raise UserError(f"unknown kind of image_spec: {spec.kind!r}")
    path, settings = _read(pathlib.Path(directory).expanduser())
    for key, wanted in _EXPECTED[spec.kind].items():
        _check(path, settings, key, wanted)
    if spec.kind == "phi_hd":
        _check(path, settings, "num_img_tokens", spec.features)
        crops = crops or settings.get("num_crops", spec.crops)
        if isinstance(crops, bool) or not isinstance(crops, int) or not 1 <= crops <= _CROPS:
            raise UserError(f"{path}: num_crops={crops!r} must be an integer from 1 to {_CROPS}")
        return PhiHD(spec, crops)
    for key in ("size", "crop_size"):
        sides = settings.get(key)
        if not isinstance(sides, dict):
            _check(path, settings, key, spec.size)
            continue
        for side, pixels in sides.items():
            _check(path, {f"{key}.{side}": pixels}, f"{key}.{side}", spec.size)
    _check(path, settings, "image_grid_pinpoints", [list(grid) for grid in spec.grids])
    return AnyResolution(spec)


def _read(directory: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Returns the settings and their file; {} where there is none."""
    for name, part in (
        ("preprocessor_config.json", None),
        ("processor_config.json", "image_processor"),  # as transformers 5 saves it
    ):
        path = directory / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is not readable JSON: {error}") from None
        found = found if part is None else found.get(part, {})
        if isinstance(found, dict):
            return path, found
    return directory / "preprocessor_config.json", {}


def _check(path: pathlib.Path, settings: dict[str, Any], key: str, wanted: Any) -> None:
    value = settings.get(key)
    if value is not None and not _same(value, wanted):
        raise UserError(f"{path}: {key}={value!r} is not built; this model's images need {wanted}")


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(wanted)
            and all(map(_same, value, wanted))
        )
    if isinstance(wanted, float):
        number = isinstance(value, (int, float)) and abs(value) <= _LARGEST
        return number and math.isclose(value, wanted, rel_tol=1e-6)
    return value == wanted
