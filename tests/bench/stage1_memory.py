"""Memory of a stage-1 step on LLaVA-1.6 at full size, from shapes and a compiler; nothing runs.

    python tests/bench/stage1_memory.py                      # arguments of a device, by shapes
    python tests/bench/stage1_memory.py --compile            # and the compiled step for A100s

--compile needs jax-cuda12-plugin and jax-cuda12-pjrt of jax's version, no GPU. Not in its figure:
workspaces of cuBLAS and cuDNN, NCCL's buffers, fragmentation: keep 10 % + 2 GiB free. Batch 768,
64 tokens, GiB a device (jax 0.10.2):

    base  devices  chunk  remat  arguments  temporaries   peak
    nf4         1     96  full        4.65         4.08   8.73    fits 24 GB
    nf4         1     24  none        4.65        16.97  21.61    does not
    bf16        8     96  full        2.60         1.91   4.50    fits 40 GB
    bf16        8      0  full        2.60        11.61  14.21    fits 40 GB, nothing encoded twice
"""

import argparse
import os

A100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
 shared_memory_per_block: 49152 shared_memory_per_core: 167936 threads_per_core_limit: 2048
 core_count: 108 fpus_per_core: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
 block_dim_limit_z: 65535 memory_bandwidth: 2039000000000 l2_cache_size: 41943040
 clock_rate_ghz: 1.41 device_memory_size: 84974239744 shared_memory_per_block_optin: 166912
 cuda_compute_capability { major: 8 minor: 0 } registers_per_core_limit: 65536
 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 } device_description_str: "NVIDIA A100-SXM4-80GB" """
LLAVA = {
    "model_type": "llava_next",
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "vocab_size": 32064,
        "sliding_window": None,
    },
    "image_token_index": 32000,
}
GIB = 2**30
# (bits of the frozen base, devices, rows a chunk, remat): what the configs use, and bf16 by FSDP.
CASES = (
    ("nf4", 1, 96, "full"),
    ("nf4", 1, 24, "none"),
    (None, 8, 96, "full"),
    (None, 8, 0, "full"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    for case in CASES:
        measure(arguments, *case)


def measure(arguments, quantize, devices, chunk, remat) -> None:
    import jax
    import numpy as np

    from unime_jax import sharding

    if arguments.compile:
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(
            platform="cuda", target_config=A100, topology=f"1x1x{devices}"
        )
        mesh = sharding.make_mesh(fsdp=devices, devices=topology.devices)
    else:
        mesh = jax.sharding.AbstractMesh((1, devices, 1), sharding.AXES)
    step, state, frozen, batch = abstract_step(arguments, mesh, quantize, chunk, remat)

    def size(tree) -> float:
        return sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * bits(leaf.dtype) / 8
            for leaf in jax.tree.leaves(tree)
        )

    parts = {"frozen": frozen, "adapters": state.trainable, "optimiser": state.opt_state}
    text = ", ".join(f"{name} {size(tree) / GIB:.2f}" for name, tree in parts.items())
    print(f"{quantize or 'bf16'}, {devices} device(s), chunk {chunk}, remat {remat}: {text} GiB")
    if arguments.compile:
        found = step.lower(state, frozen, batch).compile().memory_analysis()
        figures = {
            "arguments": found.argument_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
            "peak": found.peak_memory_in_bytes,
        }
        text = ", ".join(f"{name} {count / GIB:.2f}" for name, count in figures.items())
        print(f"  compiled: {text} GiB", flush=True)


def bits(dtype) -> int:
    import jax.numpy as jnp

    return 4 if dtype == jnp.uint4 else 8 * dtype.itemsize


def abstract_step(arguments, mesh, quantize, chunk, remat):
    """Returns the training step, and its arguments as shapes on their shardings."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from unime_jax import models, optim, sharding, steps
    from unime_jax.models import lora, qlora
    from unime_jax.types import Batch, Inputs, flatten

    def placed(path, leaf):
        where = sharding.sharding_of(mesh)(path, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    graphdef, params = models.abstract(
        LLAVA, part="language", quantize=quantize, dtype="bfloat16", remat=remat
    )
    model = nnx.merge(graphdef, params)
    model = nnx.eval_shape(
        lambda model: lora.attach(
            model, rank=32, alpha=64.0, dropout=0.05, targets=qlora.TARGETS, rngs=nnx.Rngs(0)
        ),
        model,
    )
    graphdef, state = nnx.split(model)
    flat = {path: placed(path, leaf) for path, leaf in flatten(nnx.to_pure_dict(state)).items()}
    trainable, frozen = optim.split_trainable(flat, [optim.ADAPTER_PATTERN])
    schedule = optim.learning_rate_schedule(peak=5e-4, kind="linear", warmup_steps=65, steps=2153)
    optimizer = optim.make_optimizer(schedule)
    state = jax.eval_shape(lambda x: steps.create_state(x, optimizer), trainable)
    shardings = sharding.state_shardings(state, mesh)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        shardings,
    )
    rows, tokens = arguments.batch, arguments.tokens
    split, whole = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, P())

    def array(shape, dtype, where=split):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    group = Inputs(
        array((rows, tokens), jnp.int32),
        array((rows,), jnp.int32),
        array((rows, tokens), jnp.int32),
        array((rows, 0, 0, 0, 3), jnp.uint8),
    )
    batch = Batch((group,), (), array((rows,), jnp.int32, whole), None, array((rows, 4096), "f4"))
    step = steps.make_train_step(
        graphdef,
        steps.make_objective("distill", temperature=0.02),
        optimizer,
        schedule=schedule,
        seed=0,
        chunk=chunk,
        dropout=True,
        mesh=mesh,
    )
    return step, state, frozen, batch


if __name__ == "__main__":
    main()
