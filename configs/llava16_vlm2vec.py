"""VLM2Vec on LLaVA-1.6, the baseline of stage 2: every target of the batch is a negative.

python -m unime_jax.train --config configs/llava16_vlm2vec.py \\
    --config.model.path=llava-v1.6-mistral-7b-hf/ --config.data.path=mmeb/
python -m unime_jax.train --config configs/llava16_vlm2vec.py:smoke    # 3 steps, tiny random model

InfoNCE over all 1024 targets, equal ones included, adapters on the vision tower as well, no stage 1
(arXiv 2410.05160).
"""

from unime_jax import tiny
from unime_jax.config import base_config


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    c = base_config()
    c.stage = "contrast"
    c.output = "runs/llava16/vlm2vec"
    c.model.path = "llava-v1.6-mistral-7b-hf"
    c.model.dtype = "bfloat16"

    c.data.path = "mmeb"  # written by `python -m unime_jax.prepare mmeb`
    c.data.prompt = "mmeb"  # the rows' own wording, no chat format, as VLM2Vec feeds it
    c.data.image_size = 336
    c.data.max_tokens = 256  # of text; images are never cut
    c.data.length_bins = 4  # 1.7 % padding with MMEB's lengths; 2.3 % with 3
    c.data.workers = 4

    c.loss.temperature = 0.02
    c.loss.k = 0  # every target of the batch
    c.loss.mask_equal_targets = False

    c.train.steps = 1000
    c.train.batch_size = 1024
    # Of the longest rows, over all devices: on 8, 4 each. On one of 140 GB 16, as `plan` tells.
    c.train.chunk = 32
    c.model.remat = "dots"
    c.train.adapters.rank = 16
    c.train.adapters.alpha = 64.0
    c.train.adapters.dropout = 0.1
    c.train.adapters.vision = True

    c.optim.learning_rate = 2e-5
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 100
    if arg == "smoke":
        _shrink(c)
    return c


def _shrink(c) -> None:
    c.output = "runs/smoke/llava16_vlm2vec"
    c.model.path = str(tiny.backbone("llava16"))
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.data.path = str(tiny.mmeb())
    c.data.image_size = 56
    c.data.max_tokens = 160  # a token a letter
    c.data.length_bins = 1
    c.data.workers = 0
    c.train.steps = 3
    c.train.batch_size = 40  # two rows of each set
    c.train.chunk = 8
    c.train.quantize = None
    c.optim.warmup_steps = 1
    c.mesh.data = -1
    c.mesh.fsdp = 1
