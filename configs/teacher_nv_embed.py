"""The teacher of stage 1: NV-Embed-v2's vectors of every NLI sentence, once, to disk.

python -m unime_jax.teach --config configs/teacher_nv_embed.py --config.teacher.path=NV-Embed-v2/ \\
    --config.data.path=nli_for_simcse.csv --config.output=nli_teacher/
python -m unime_jax.teach --config configs/teacher_nv_embed.py:smoke    # a tiny random teacher

Any other teacher works the same way: a BERT of sentence-transformers, a decoder.
"""

from unime_jax import tiny
from unime_jax.config import base_config


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    c = base_config()
    c.stage = "teach"
    c.output = "nli_teacher"
    c.model.dtype = "bfloat16"
    c.teacher.instruction = ""  # both sides of NLI are passages
    # 15.7 GB fit one device; whole copies need no gathers. Split a bigger teacher by mesh.fsdp.
    c.mesh.data = -1
    c.mesh.fsdp = 1
    if arg == "smoke":
        c.output = "runs/smoke/nli_teacher"
        c.model.dtype = "float32"
        c.teacher.path = str(tiny.backbone("nv_embed"))
        c.data.path = str(tiny.nli())
    return c
