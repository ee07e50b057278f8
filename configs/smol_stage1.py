"""Stage 1 of the newcomer's run: distil MiniLM's similarities into the small language model.

python -m unime_jax.train --config configs/smol_stage1.py          # the run
python -m unime_jax.train --config configs/smol_stage1.py:smoke    # a few steps
"""

from unime_jax.config import base_config
from unime_jax.runtime import cache_directory


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    smoke = arg == "smoke"
    assets = cache_directory() / ("smol-smoke" if smoke else "smol")
    c = base_config()
    c.stage = "distill"
    c.output = "runs/smol-smoke/stage1" if smoke else "runs/smol/stage1"
    c.model.path = str(assets / "student")
    c.model.remat = "dots"  # as fast as keeping all, in half of the memory
    c.data.path = str(assets / "data")
    c.data.max_tokens = 48
    c.data.length_bins = 2 if smoke else 4  # 2 compile in half the time; 4 pad less
    c.teacher.path = str(assets / "teacher")
    c.teacher.vectors = str(assets / "teacher-vectors")
    c.loss.temperature = 0.05  # 0.02 is for teachers as sharp as NV-Embed-v2
    c.loss.kl_diagonal = False  # after 40 steps: Spearman .48, with the diagonal .12
    c.train.steps = 4 if smoke else 200
    c.train.batch_size = 16 if smoke else 128
    c.train.adapters.rank = 32
    c.train.adapters.alpha = 64.0
    c.optim.learning_rate = 1e-3
    c.optim.multipliers = (("lora_B$", 4.0),)  # LoRA+; after 20 steps: Spearman .47, without .44
    c.optim.warmup_steps = 1 if smoke else 10
    c.eval.every_steps = 4 if smoke else 50
    c.checkpoint.every_steps = 0
    c.checkpoint.every_seconds = 30.0
    return c
