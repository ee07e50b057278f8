"""UniME-V2's judged hard negatives on LLaVA-1.6: soft labels of each row's own 8 negatives.

python -m unime_jax.train --config configs/llava16_judged.py \\
    --config.model.path=runs/llava16/stage1 --config.data.path=judged.json \\
    --config.data.images=IMAGE_ROOT
python -m unime_jax.train --config configs/llava16_judged.py:smoke    # 3 steps, tiny random model

The file is UniME-V2's (arXiv 2510.13515), or one of your own in the same form.
"""

from unime_jax import tiny
from unime_jax.config import base_config


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    c = base_config()
    c.stage = "judge"
    c.output = "runs/llava16/judged"
    c.model.path = "runs/llava16/stage1"
    c.model.dtype = "bfloat16"

    c.data.path = "judged.json"
    c.data.prompt = "mmeb"  # the rows' own wording, no chat format, as VLM2Vec feeds it
    c.data.image_size = 336
    c.data.max_tokens = 256  # of text; images are never cut
    c.data.length_bins = 4
    c.data.workers = 4

    c.loss.temperature = 0.02
    c.loss.k = 8  # of each row's own

    c.train.steps = 1000
    c.train.batch_size = 1024
    # Of the longest rows, over all devices: on 8, 4 each. On one of 140 GB 16, as `plan` tells.
    c.train.chunk = 32
    c.model.remat = "dots"
    c.train.quantize = "nf4"
    c.train.adapters.rank = 16
    c.train.adapters.alpha = 64.0
    c.train.adapters.dropout = 0.1

    c.optim.learning_rate = 2e-5
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 100
    if arg == "smoke":
        _shrink(c)
    return c


def _shrink(c) -> None:
    c.output = "runs/smoke/llava16_judged"
    c.model.path = str(tiny.backbone("llava16"))
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.data.path = str(tiny.judged())
    c.data.image_size = 56
    c.data.max_tokens = 160  # a token a letter
    c.data.length_bins = 1
    c.data.workers = 0
    c.loss.k = 3
    c.train.steps = 3
    c.train.batch_size = 16
    c.train.chunk = 8
    c.train.quantize = None
    c.optim.warmup_steps = 1
    c.mesh.data = -1
    c.mesh.fsdp = 1
