"""All parts of a speed test but the training steps: files, start-up, embedding, attention."""

import pathlib
import sys
import time

import measure
import numpy as np
import workers
from bench import Bench, Missing
from measure import Result

EMBED_PARITY = 1e-4  # cosine distance: rows of one picture each, resized by two libraries


def pipeline(bench: Bench) -> list[Result]:
    """Times what one worker makes of files."""
    folder = bench.scratch / "pipeline"
    bench.run([sys.executable, str(workers.HERE / "pipeline_side.py"), "files", str(folder)])
    pair = {side: bench.worker("pipeline_side.py", side, str(folder)) for side in measure.SIDES}
    first = {side: pair[side].ready["first"] for side in pair}
    found = workers.take_turns(pair, bench.repeats)
    for worker in pair.values():
        worker.close()
    rates = {side: [x["rows"] / x["seconds"] for x in found[side]] for side in found}
    note = {
        "positions of a row": {side: first[side]["tokens"] for side in first},
        "PyTorch's": pair["torch"].ready["processor"],
    }
    return [Result("pipeline", "data, one worker: JPEG and text to batch", "rows/s", rates, note)]


def load(bench: Bench) -> list[Result]:
    """Times reading a checkpoint of 0.5 GB, and the memory that takes."""
    folder = bench.scratch / "load"
    bench.prepare("tiny" if bench.tiny else "load", folder)
    found = {side: [] for side in measure.SIDES}
    for _ in range(1 + bench.repeats):  # the first reads the file from the disk
        for side, answers in found.items():
            worker = bench.worker("once_side.py", "load", side, str(folder))
            answers.append({**worker.ready, **worker.close()})
    found = {side: answers[1:] for side, answers in found.items()}
    size = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors")) / 2**30
    note = {"imports, s": {side: measure.median([x["import_seconds"] for x in found[side]])
                           for side in found}}  # fmt: skip

    def of(key):
        return {side: [x[key] for x in answers] for side, answers in found.items()}

    return [
        Result("load", f"load {size:.2f} GiB in bf16, imports included", "s", of("seconds"), note),
        Result("load_memory", "  its peak memory", "GiB", of("peak_gib")),
    ]


def save(bench: Bench) -> list[Result]:
    """Times how long a step waits for a checkpoint."""
    folder = bench.scratch / "save"
    bench.prepare("tiny" if bench.tiny else "stage2_llava", folder)
    pair = {side: bench.worker("once_side.py", "save", side, str(folder)) for side in measure.SIDES}
    found = workers.take_turns(pair, bench.repeats)
    for worker in pair.values():
        worker.close()
    stalls = {side: [x["stall"] for x in found[side]] for side in found}
    written = measure.median([x["until on disk"] for x in found["ours"]])
    note = {"ours on the disk after, s": written}
    return [Result("save", "checkpoint: time that training waits", "s", stalls, note)]


def embed(bench: Bench) -> list[Result]:
    """Times `unime_jax.embed` from start to end of its process, on mixed rows."""
    import embed as files

    from unime_jax import runtime

    folder = bench.scratch / "embed"
    folder.mkdir()
    model = runtime.cache_directory() / "smol" / "student"
    if bench.tiny:
        model = files.tiny_model(folder)
    elif not (model / "config.json").is_file():
        raise Missing("the small assets: python -m unime_jax.prepare smol")
    count = 60 if bench.quick else 400
    rows, cache = files.write_rows(folder, count), str(folder / "cache")

    def once(side):
        return files.measure(side, str(model), rows, folder / f"{side}.npz", cache)

    cold = once("ours")
    found = {side: [] for side in measure.SIDES}
    for _ in range(bench.repeats):
        for side, answers in found.items():
            answers.append(once(side))
    ours, torch = (np.load(folder / f"{side}.npz")["vectors"] for side in measure.SIDES)
    distance = float(np.abs(1 - (ours * torch).sum(axis=1)).max())
    if not distance <= EMBED_PARITY:  # so that NaN does not pass
        raise workers.WorkerError(f"the sides' vectors differ: cosine distance {distance:.1e}")
    rates = {side: [count / x["wall"] for x in answers] for side, answers in found.items()}
    memory = {side: [x["peak"] for x in answers] for side, answers in found.items()}
    note = {"with nothing compiled yet, rows/s": count / cold["wall"],
            "largest cosine distance": distance}  # fmt: skip
    return [
        Result(
            "embed",
            f"embed {count} mixed rows, start included ({'tiny' if bench.tiny else 'smol'})",
            "rows/s",
            rates,
            note,
        ),
        Result("embed_memory", "  its peak memory", "GB", memory),
    ]


def startup(bench: Bench, stage1: bool = False) -> list[Result]:
    """Times a run from its command to its first finished step."""
    from unime_jax import runtime

    smol = runtime.cache_directory() / "smol"
    found = []
    if bench.tiny or not (smol / "student" / "config.json").is_file():
        tries = {"startup_smoke": ["configs/llava16_stage1.py:smoke"]}
    else:
        model = f"--config.model.path={smol / 'student'}"
        tries = {"startup_stage2": ["configs/smol_stage2.py", model]}
        if stage1:
            tries = {"startup_stage1": ["configs/smol_stage1.py"]}
    for name, (config, *more) in tries.items():
        runs = []
        for number in range(1 + min(bench.repeats, 2)):
            output = bench.scratch / f"{name}-{number}"
            command = [sys.executable, str(workers.HERE / "startup_side.py")]
            command += ["--config", str(workers.ROOT / config), *more, f"--config.output={output}"]
            start = time.perf_counter()
            cache = {"JAX_COMPILATION_CACHE_DIR": str(bench.scratch / f"{name}-compiled")}
            answer = workers.last_json(bench.run(command, cache))
            runs.append({"command": time.perf_counter() - start, **answer})
        cold, *warm = runs
        middle = sorted(warm, key=lambda run: run["command"])[len(warm) // 2]
        note = {"nothing compiled yet, s": cold["command"], "the middle run": middle}
        title = f"from command to first step, {pathlib.Path(config).stem}, compiled before"
        found.append(Result(name, title, "s", {"ours": [x["command"] for x in warm]}, note))
    return found


def attention(bench: Bench) -> list[Result]:
    """Times cuDNN's attention against XLA's, and says how far each is from f32."""
    kind = "tiny" if bench.tiny else "full"
    command = [sys.executable, str(workers.HERE / "attention_side.py"), kind, str(bench.repeats)]
    return [
        Result(f"attention_{one['width']}_{one['implementation']}",
               f"attention, heads of {one['width']}, {one['implementation']}, there and back",
               "ms", {"ours": one["milliseconds"]}, {"differs from f32 by": one["difference"]})
        for one in workers.last_json(bench.run(command))
    ]  # fmt: skip
