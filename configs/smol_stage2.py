"""Stage 2 of the newcomer's run: hard-negative contrastive tuning on image-caption pairs.

python -m unime_jax.train --config configs/smol_stage2.py          # the run
python -m unime_jax.train --config configs/smol_stage2.py:smoke    # a few steps
"""

from unime_jax.config import base_config
from unime_jax.runtime import cache_directory


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    smoke = arg == "smoke"
    assets = cache_directory() / ("smol-smoke" if smoke else "smol")
    runs = "runs/smol-smoke" if smoke else "runs/smol"
    c = base_config()
    c.stage = "contrast"
    c.output = f"{runs}/stage2"
    c.model.path = f"{runs}/align"
    c.model.remat = "dots"  # as fast as keeping all, in half of the memory
    c.data.path = str(assets / "data")
    c.data.max_tokens = 32
    c.data.length_bins = 1 if smoke else 2  # one bin compiles faster
    c.data.features = str(assets / "features")
    c.data.variants = 1 if smoke else 3
    c.data.directions = ("image_to_text", "text_to_image")
    c.data.extra_texts = 0.3
    c.loss.temperature = 0.02
    c.loss.k = 8
    c.loss.margin = 0.1
    c.train.steps = 4 if smoke else 30
    c.train.batch_size = 16 if smoke else 128
    c.train.chunk = 8 if smoke else 64
    c.train.adapters.rank = 16
    c.train.adapters.alpha = 64.0
    # 30 small steps overfit nothing, and dropout more than doubles the time to compile.
    c.train.adapters.dropout = 0.0
    c.train.trainable = (r"^multi_modal_projector/",)
    # Small steps: with 4e-5 and 15 times that for the projector, the cosines of all pairs rose from
    # .6 to .75 within 15 steps and validation R@10 fell from .66 to .54 (8 of 127 negatives push).
    c.optim.learning_rate = 1e-5
    c.optim.multipliers = ((r"^multi_modal_projector/", 5.0),)
    c.optim.warmup_steps = 1 if smoke else 5
    c.eval.every_steps = 4 if smoke else 10
    c.checkpoint.every_steps = 0
    c.checkpoint.every_seconds = 30.0
    return c
