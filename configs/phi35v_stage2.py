"""Stage 2 of UniME on Phi-3.5-vision: hard negatives of batches of 1024 pairs of MMEB.

python -m unime_jax.prepare mmeb --source MMEB-train/ --images IMAGE_ROOT --output mmeb/
python -m unime_jax.train --config configs/phi35v_stage2.py \\
    --config.model.path=runs/phi35v/stage1 --config.data.path=mmeb/
python -m unime_jax.train --config configs/phi35v_stage2.py:smoke    # 3 steps, tiny random model

Figure 5's curves: --config.loss.negatives=random or easy.
"""

from unime_jax import tiny
from unime_jax.config import base_config


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    c = base_config()
    c.stage = "contrast"
    c.output = "runs/phi35v/stage2"
    c.model.path = "runs/phi35v/stage1"
    c.model.dtype = "bfloat16"

    c.data.path = "mmeb"  # written by `python -m unime_jax.prepare mmeb`
    c.data.prompt = "mmeb"  # the rows' own wording, no chat format, as VLM2Vec feeds it
    c.data.image_size = 336
    c.data.image_crops = 1  # and the thumbnail, which is the same picture
    c.data.max_tokens = 256  # of text; images are never cut
    c.data.length_bins = 4  # 5 % padding with MMEB's lengths; 8 % with 3
    c.data.workers = 4

    c.loss.temperature = 0.02
    c.loss.k = 8
    c.loss.margin = 0.1

    c.train.steps = 1000
    c.train.batch_size = 1024
    # Of the longest rows, over all devices: on 8, 8 each.
    c.train.chunk = 64
    c.model.remat = "dots"
    c.train.quantize = "nf4"
    c.train.adapters.rank = 16
    c.train.adapters.alpha = 64.0
    c.train.adapters.dropout = 0.1

    c.optim.learning_rate = 1e-4
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 100
    if arg == "smoke":
        _shrink(c)
    return c


def _shrink(c) -> None:
    c.output = "runs/smoke/phi35v_stage2"
    c.model.path = str(tiny.backbone("phi35v"))
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.data.path = str(tiny.mmeb())
    c.data.image_size = 56
    c.data.max_tokens = 160  # a token a letter
    c.data.length_bins = 1
    c.data.workers = 0
    c.loss.k = 4
    c.train.steps = 3
    c.train.batch_size = 40  # two rows of each set
    c.train.chunk = 8
    c.train.quantize = None
    c.optim.warmup_steps = 1
    c.mesh.data = -1
    c.mesh.fsdp = 1
