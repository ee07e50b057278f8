"""Things that are done once: `once_side.py WHAT SIDE FOLDER`, see workers.

WHAT "load": reads a checkpoint into a model that is ready to embed, imports included; each time
needs a process of its own. "save": how long a training step waits for a checkpoint of adapters and
optimiser, 14 MB; ours is written to the disk behind the next steps (Orbax), PyTorch's is peft's
save_pretrained and torch.save, as Trainer calls them.
"""

import os
import pathlib
import sys
import time

import numpy as np
import workers


def load_ours(folder: pathlib.Path):
    start = time.perf_counter()
    import jax

    import unime_jax

    imported = time.perf_counter()
    embedder = unime_jax.load(folder / "model", dtype="bfloat16")
    jax.block_until_ready(embedder.params)
    return _loaded(start, imported)


def load_torch(folder: pathlib.Path):
    start = time.perf_counter()
    import torch
    import transformers

    imported = time.perf_counter()
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    for parameter in model.parameters():  # it maps the file: a byte of each page, to read it
        parameter.detach().flatten().view(torch.uint8)[::4096].sum()
    return _loaded(start, imported)


def _loaded(start: float, imported: float):
    now = time.perf_counter()
    return {"seconds": now - start, "import_seconds": imported - start}, dict


def save_ours(folder: pathlib.Path):
    import jax

    from unime_jax import checkpoint, optim, runtime, steps

    runtime.start()
    with np.load(folder / "first.npz") as file:
        first = {path: jax.numpy.asarray(file[path]) for path in file.files}
    optimizer = optim.make_optimizer(lambda step: 1e-4)
    run = folder / f"saves-{os.getpid()}"
    saves = checkpoint.Checkpoints(run, config={}, keep=2)
    state = jax.block_until_ready(steps.create_state(first, optimizer))

    def act():
        nonlocal state
        state = steps.TrainState(state.step + 1, state.trainable, state.opt_state)
        written = run / "checkpoints" / str(int(state.step))
        start = time.perf_counter()
        saves.save(state, force=True)
        stall = time.perf_counter() - start
        while not written.is_dir():  # it gets its name when it is whole
            time.sleep(0.005)
        on_disk = time.perf_counter() - start
        time.sleep(0.5)  # older ones are removed meanwhile, as between two saves of a run
        return {"stall": stall, "until on disk": on_disk}

    act()
    return {}, act


def save_torch(folder: pathlib.Path):
    import rows as rows_files
    import torch
    import torch_side

    settings = rows_files.read_case(folder)
    model = torch_side.Model(folder, settings, "eager", "cpu", torch.float32)
    optimizer = torch.optim.AdamW(model.trained)
    for parameter in model.trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    output = folder / f"saves-{os.getpid()}"

    def act():
        start = time.perf_counter()
        model.adapted.save_pretrained(output)
        torch.save(optimizer.state_dict(), output / "optimizer.pt")
        return {"stall": time.perf_counter() - start}

    act()
    return {}, act


if __name__ == "__main__":
    what, side, path = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
    workers.keep_to_two_cores()
    workers.serve(lambda: globals()[f"{what}_{side}"](path))
