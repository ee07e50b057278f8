"""Attention of both kernels on a GPU: `attention_side.py full|tiny REPEATS`; on CPU XLA's alone.

A causal row of 2048 positions, forward and backward in bfloat16, heads of 64, 96 and 128; how far
output and gradients are from the same in f32, relative to their largest.
"""

import json
import sys
import time


def main(kind: str, repeats: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from unime_jax.models.attention import attention

    rows, tokens, heads = (2, 64, 2) if kind == "tiny" else (8, 2048, 16)
    kernels = ["xla"] + ["cudnn"] * (jax.devices()[0].platform == "gpu")
    found = []
    for width in (64, 96, 128):
        rng = np.random.default_rng(0)
        shape = (4, rows, tokens, heads, width)
        exact = [jnp.asarray(x) for x in rng.standard_normal(shape, np.float32)]

        def both(q, k, v, direction, kernel):
            def forward(q, k, v):
                return attention(q, k, v, causal=True, implementation=kernel)

            out, back = jax.vjp(forward, q, k, v)
            return out, *back(direction)

        run = jax.jit(both, static_argnums=4)
        with jax.default_matmul_precision("highest"):
            wanted = jax.jit(both, static_argnums=4)(*exact, "xla")
        half = [x.astype(jnp.bfloat16) for x in exact]
        for kernel in kernels:
            out = jax.block_until_ready(run(*half, kernel))
            far = max(
                float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
                for a, b in zip(out, wanted, strict=True)
            )
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                jax.block_until_ready(run(*half, kernel))
                times.append(1e3 * (time.perf_counter() - start))
            one = {"width": width, "implementation": kernel, "difference": far}
            found.append({**one, "milliseconds": times})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
