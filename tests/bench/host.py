"""Images and samples a second and thread on the host, and the padding of mixed rows.

PYTHONPATH=. python tests/bench/host.py
"""

import collections
import io
import json
import pathlib
import tempfile
import time

import numpy as np
from PIL import Image

from unime_jax import tiny
from unime_jax.data import buckets, pipeline, preprocess, task_pairs
from unime_jax.types import ImageSpec

GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
PHI = ImageSpec("phi_hd", 336, 144, crops=16)
LLAVA = ImageSpec("llava_anyres", 336, 576, grids=GRIDS)
MODELS = {
    "Phi-3.5-V, 16 crops": (PHI, {}),
    "Phi-3.5-V, 4 crops": (PHI, {"image_crops": 4}),
    "Phi-3.5-V, 336 px": (PHI, {"image_crops": 1, "image_size": 336}),
    "LLaVA-1.6": (LLAVA, {}),
    "LLaVA-1.6, 336 px": (LLAVA, {"image_size": 336}),
}
# Sizes of photographs in COCO and elsewhere.
SIZES = [(640, 480), (480, 640), (500, 375), (375, 500), (640, 427), (640, 640), (1920, 1080)]


def jpeg(width: int, height: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
    file = io.BytesIO()
    small.resize((width, height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def speed(model: preprocess.Preprocessor, size: tuple[int, int], count: int = 16) -> float:
    """Images a second of one thread's processor time, decoding included."""
    files = [jpeg(*size, seed) for seed in range(count)]
    model.image(files[0])
    start = time.thread_time()
    for file in files:
        model.image(file)
    return count / (time.thread_time() - start)


def samples(spec: ImageSpec, options: dict, rows: int = 64, batches: int = 3) -> float:
    """Training rows a second of one thread's processor time, from files to the packed batch.

    A row is a picture of 640 x 480 with a text of 60 letters, and a text of 20 as its target; the
    tiny tokenizer makes a token of each letter.
    """
    with tempfile.TemporaryDirectory() as root:
        file, lines = pathlib.Path(root) / "pairs.jsonl", []
        for number in range(rows):
            file.with_name(f"{number}.jpg").write_bytes(jpeg(640, 480, number))
            query = f"<|image_1|>\nWhat does picture {number:5} show? {'a word ' * 4}"
            target = f"{number:5} {'b word ' * 2}"
            lines.append({"query_text": query, "query_image": f"{number}.jpg",
                          "target_text": target})  # fmt: skip
        file.write_text("\n".join(map(json.dumps, lines)))
        model = preprocess.Preprocessor(
            tiny.backbone("llava16"), spec, prompt="mmeb", max_tokens=8192,
            image_token_id=260 if spec.kind == "llava_anyres" else -1, **options,
        )  # fmt: skip
        made = pipeline.Batches(task_pairs.read(file), model, batch_size=rows, max_tokens=256)
        _ = made[0]
        start = time.thread_time()
        for step in range(1, 1 + batches):
            _ = made[step]
        return batches * rows / (time.thread_time() - start)


def padding(model: preprocess.Preprocessor, rows: int = 600) -> str:
    """Mixes texts, images and both; images come in the usual sizes and, for 3 in 10, in others."""
    rng = np.random.default_rng(0)
    shapes, real = [], 0
    for _ in range(rows):
        kind = int(rng.integers(3))
        length = 12 + (kind != 1) * int(np.clip(rng.lognormal(3, 0.6), 4, 200))
        tiles = 0
        if kind:
            width, height = SIZES[rng.integers(len(SIZES))]
            if rng.random() < 0.3:
                width, height = int(width * rng.uniform(0.7, 1.4)), height
            layout = model.layout(width, height)
            length, tiles = length + layout.positions, model.transform.bucket(layout.tiles)
        shapes.append((buckets.padded_length(length, model.max_tokens), tiles))
        real += length
    limits = buckets.LIMITS
    groups = buckets.sort(shapes, limits)
    padded = sum(limits.padded(len(g.members)) * g.tokens for g in groups)
    kinds = collections.Counter((limits.padded(len(g.members)), g.tokens, g.tiles) for g in groups)
    return f"{1 - real / padded:.1%} padding, {len(groups)} groups of {len(kinds)} shapes"


if __name__ == "__main__":
    here = pathlib.Path(__file__).parent
    for name, (spec, options) in MODELS.items():
        model = preprocess.Preprocessor(here, spec, prompt="", max_tokens=8192, **options)
        speeds = [f"{w} x {h}: {speed(model, (w, h)):.0f}/s" for w, h in SIZES[::6] + [(672, 672)]]
        print(f"{name:<20} {', '.join(speeds)}; {padding(model)}")
        if options.get("image_size"):
            print(f"{'':<20} {samples(spec, options):.0f} samples/s with pictures of 640 x 480")
