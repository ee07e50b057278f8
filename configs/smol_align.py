"""Alignment of the newcomer's run: train the projector alone, tower and decoder frozen.

The assembled student has a random projector, so it is no multimodal model yet. Its images are
brought to where the decoder, after stage 1, already puts their captions.

    python -m unime_jax.train --config configs/smol_align.py          # the run
    python -m unime_jax.train --config configs/smol_align.py:smoke    # a few steps
"""

from unime_jax.config import base_config
from unime_jax.runtime import cache_directory


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    smoke = arg == "smoke"
    assets = cache_directory() / ("smol-smoke" if smoke else "smol")
    runs = "runs/smol-smoke" if smoke else "runs/smol"
    c = base_config()
    c.stage = "align"
    c.output = f"{runs}/align"
    c.model.path = f"{runs}/stage1"
    c.data.path = str(assets / "data")
    c.data.max_tokens = 32
    c.data.features = str(assets / "features")
    c.data.variants = 1 if smoke else 3
    # Keywords and dictionary definitions: R@10 .42 -> .50, with more steps.
    c.data.extra_texts = 0.0 if smoke else 0.3
    c.loss.temperature = 0.05
    c.train.steps = 4 if smoke else 300
    c.train.batch_size = 16 if smoke else 128
    c.train.adapters.rank = 0
    # R@10 of 100 validation pairs, i2t / t2i: .77 / .67 after 300 steps, without it .74 / .63 after
    # 450; one run each, within the noise.
    c.train.feature_dropout = 0.3
    c.train.trainable = (r"^multi_modal_projector/",)
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 1 if smoke else 5
    c.eval.every_steps = 4 if smoke else 50
    c.checkpoint.every_steps = 0
    c.checkpoint.every_seconds = 30.0
    return c
