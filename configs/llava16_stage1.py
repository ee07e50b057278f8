"""Stage 1 of UniME on LLaVA-1.6: distil NV-Embed-v2's similarities of NLI sentences.

python -m unime_jax.teach --config configs/teacher_nv_embed.py --config.teacher.path=NV-Embed-v2/ \\
    --config.data.path=nli_for_simcse.csv --config.output=nli_teacher/
python -m unime_jax.train --config configs/llava16_stage1.py \\
    --config.model.path=llava-v1.6-mistral-7b-hf/ --config.data.path=nli_for_simcse.csv \\
    --config.teacher.vectors=nli_teacher/
python -m unime_jax.train --config configs/llava16_stage1.py:smoke    # 3 steps, tiny random model

Only the language model is loaded and trained; the run loads as the whole model again.
"""

from unime_jax import tiny
from unime_jax.config import base_config


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    c = base_config()
    c.stage = "distill"
    c.output = "runs/llava16/stage1"
    c.model.dtype = "bfloat16"
    c.data.path = "nli_for_simcse.csv"
    c.data.prompt = "llava16_stage1"
    c.data.max_tokens = 64
    c.data.length_bins = 5
    c.teacher.vectors = "nli_teacher"
    c.loss.temperature = 0.02
    # As the paper writes Eq. 2. Without the diagonal far more is left to learn from (`distill_kl`).
    c.loss.kl_diagonal = True
    c.train.epochs = 2.0
    c.train.batch_size = 768  # sentences: 256 rows of three
    c.train.chunk = 192  # rows encoded at a time: 17 GiB of one GPU; 12 with 96, a fifth slower
    c.model.remat = "full"
    c.train.quantize = "nf4"
    c.train.adapters.rank = 32
    c.train.adapters.alpha = 64.0
    c.train.adapters.dropout = 0.05
    c.optim.learning_rate = 5e-4
    c.optim.warmup_share = 0.03
    if arg == "smoke":
        _shrink(c)
    return c


def _shrink(c) -> None:
    c.output = "runs/smoke/llava16_stage1"
    c.model.path = str(tiny.backbone("llava16"))
    c.model.dtype = "float32"
    c.data.path = str(tiny.nli())
    c.data.max_tokens = 192  # a token a letter
    c.data.length_bins = 1
    c.teacher.vectors = str(tiny.vectors())
    c.train.epochs = 0.0
    c.train.steps = 3
    c.train.batch_size = 24
    c.train.chunk = 4
    c.model.remat = "none"  # compiles faster
    c.mesh.data = -1
    c.mesh.fsdp = 1
