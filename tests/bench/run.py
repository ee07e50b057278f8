"""Speed, memory and start-up of unime_jax beside PyTorch: `python tests/bench/run.py`.

    python tests/bench/run.py                              # all of it on CPU, some 12 minutes
    python tests/bench/run.py --only stage2_llava embed    # a part
    python tests/bench/run.py --quick                      # fewer rounds, to see that it runs
    python tests/bench/run.py --device gpu                 # full-size models; not yet run anywhere
    python tests/bench/run.py --device gpu --tiny          # the same code on tiny shapes, on CPU

Both sides compute the same thing: same weights, rows, padding and dtype, and the losses and
gradient norms of their first steps agree to 1e-4, or the run fails. PyTorch's side is transformers
and peft with its fastest of eager and torch.compile. Each side is a process of its own with two
threads; they take turns. Written to --output: results.json (machine, versions, every sample),
results.md and results.png. Needs torch, transformers and peft (the extra `dev`).
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import gpu_cases
import measure
import workers
from measure import Result
from workers import Worker, WorkerError

PARITY = 1e-4  # of loss and gradient norm, relative
GPU_PARITY = 2e-2  # in bfloat16
VARIANTS = ("eager", "compile")


def training(name: str, bench: "Bench") -> list[Result]:
    """Times a training step; both sides first show that they compute the same."""
    folder = bench.scratch / name
    bench.prepare(name, folder)
    case = workers.read_json(folder / "case.json")["case"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    ours = bench.worker("jax_side.py", str(folder), env=cache)
    cold = ours.ready | ours.close()
    ours = bench.worker("jax_side.py", str(folder), env=cache)  # compiled before, as most runs are
    if not case["torch"]:
        return _alone(name, case, ours, cold, bench)
    variant, torch, tried = _fastest(folder, bench)
    difference = _parity(ours.ready["first"], torch.ready["first"])
    limit = PARITY if bench.device == "cpu" else GPU_PARITY
    if difference > limit:
        ours.kill(), torch.kill()
        raise WorkerError(
            f"the sides differ by {difference:.1e} ({ours.ready['first']} and "
            f"{torch.ready['first']}): nothing was timed"
        )
    found = workers.take_turns({"ours": ours, "torch": torch}, bench.repeats, warm=1)
    peaks = {"ours": ours.close()["peak_gib"], "torch": torch.close()["peak_gib"]}
    last = _parity(*(found[side][-1] for side in measure.SIDES))
    speeds = {side: [case["rows"] / x["seconds"] for x in found[side]] for side in found}
    unit = "sentences/s" if case["stage"] == "distill" else "pairs/s"
    notes = {
        "PyTorch's fastest": variant,
        "seconds a step": {side: measure.median([x["seconds"] for x in found[side]])
                           for side in found},
        "first step differs by": difference,
        f"step {bench.repeats + 2} by": last,
        "first call, s": {"ours": cold["first_seconds"],
                          "ours, compiled before": ours.ready["first_seconds"],
                          **{key: value["first_seconds"] for key, value in tried.items()}},
        "peak GiB": {"ours, when it compiles": cold["peak_gib"],
                     **{key: value["peak_gib"] or peaks["torch"] for key, value in tried.items()}},
    }  # fmt: skip
    memory = {side: [peak] for side, peak in peaks.items()}
    return [
        Result(name, case["title"], unit, speeds, notes),
        Result(f"{name}_memory", "  its peak memory", "GiB", memory),
    ]


def _alone(name: str, case, ours: Worker, cold, bench: "Bench") -> list[Result]:
    """Times a step that PyTorch's side does not have."""
    found = workers.take_turns({"ours": ours}, bench.repeats)["ours"]
    peak = ours.close()["peak_gib"]
    speeds = {"ours": [case["rows"] / x["seconds"] for x in found]}
    note = {"seconds a step": measure.median([x["seconds"] for x in found])}
    note |= {"first call, s": cold["first_seconds"], "planned GiB": cold.get("planned_gib", "-")}
    return [
        Result(name, case["title"], "rows/s", speeds, note),
        Result(f"{name}_memory", "  its peak memory", "GiB", {"ours": [peak]}),
    ]


def _fastest(folder: pathlib.Path, bench: "Bench"):
    """Returns PyTorch's fastest way, its worker, and what the others took."""
    tried, best = {}, None
    for variant in bench.variants:
        try:
            worker = bench.worker("torch_side.py", str(folder), variant, bench.torch_device)
        except WorkerError as error:
            print(f"  PyTorch, {variant}: does not run: {str(error).strip().splitlines()[-1]}")
            continue
        seconds = min(worker.step()["seconds"] for _ in range(2))
        tried[variant] = {"seconds": seconds, "first_seconds": worker.ready["first_seconds"]}
        print(f"  PyTorch, {variant}: {seconds:.2f} s a step", flush=True)
        if best is None or seconds < tried[best[0]]["seconds"]:
            loser, best = best, (variant, worker)
        else:
            loser = variant, worker
        if loser is not None:
            tried[loser[0]] |= loser[1].close()
    if best is None:
        raise WorkerError("no way of PyTorch runs")
    tried[best[0]].setdefault("peak_gib", None)
    return *best, tried


def _parity(ours: dict[str, float], torch: dict[str, float]) -> float:
    """Largest relative difference of loss and gradient norm."""
    names = ("loss", "gradient_norm")
    return max(abs(ours[name] / torch[name] - 1) for name in names)


class Bench:
    """What the tests share."""

    def __init__(self, args: argparse.Namespace, scratch: pathlib.Path):
        self.scratch, self.repeats, self.tiny = scratch, args.repeats, args.tiny
        self.quick, self.device = args.quick, args.device
        self.torch_device = "cuda" if args.device == "gpu" and not args.tiny else "cpu"
        self.variants = VARIANTS[:1] if args.quick else VARIANTS

    def prepare(self, name: str, folder: pathlib.Path) -> None:
        command = [sys.executable, str(workers.HERE / "cases.py"), name, str(folder)]
        self.run(command)

    def run(self, command: list[str], env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=workers.environment(self.platform | (env or {})),
        )
        if done.returncode:
            raise WorkerError(done.stderr[-3000:] or done.stdout[-3000:])
        return done.stdout

    @property
    def platform(self) -> dict[str, str]:
        if self.torch_device == "cpu":
            return {"JAX_PLATFORMS": "cpu"}
        # Both sides hold their models on one GPU.
        return {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}

    def worker(self, script: str, *arguments: str, env: dict[str, str] | None = None) -> Worker:
        return Worker(script, *arguments, env=self.platform | (env or {}))


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

    model = runtime.cache_directory() / "smol" / "student"
    if not (model / "config.json").is_file():
        raise Missing("the small assets: python -m unime_jax.prepare smol")
    folder = bench.scratch / "embed"
    folder.mkdir()
    count = 100 if bench.quick else 500
    rows, cache = files.write_rows(folder, count), str(folder / "cache")

    def once(side):
        return files.measure(side, str(model), rows, folder / f"{side}.npz", cache)

    cold = once("ours")
    found = {side: [] for side in measure.SIDES}
    for _ in range(bench.repeats):
        for side, answers in found.items():
            answers.append(once(side))
    rates = {side: [count / x["wall"] for x in answers] for side, answers in found.items()}
    memory = {side: [x["peak"] for x in answers] for side, answers in found.items()}
    note = {"with nothing compiled yet, rows/s": count / cold["wall"]}
    return [
        Result("embed", f"embed {count} mixed rows, start included (smol)", "rows/s", rates, note),
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


class Missing(Exception):
    """What a test needs is not at hand."""


TRAINING = ("stage2_llava", "stage2_smol", "stage1_smol")
MORE = ("stage2_llava_whole", "startup_stage1")  # only where they are named
OTHERS: dict[str, Callable[[Bench], list[Result]]] = {
    "embed": embed,
    "pipeline": pipeline,
    "load": load,
    "save": save,
    "startup": startup,
    "attention": attention,
    "startup_stage1": lambda bench: startup(bench, stage1=True),
}
TINY = ("tiny", "tiny_stage1")
GPU = gpu_cases.NAMES


def names_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the tests that `--only` may name, in the order in which they run."""
    if args.device == "gpu":
        names = tuple(f"{name}_tiny" for name in GPU) if args.tiny else GPU
        return (*names, "attention")
    others = tuple(name for name in OTHERS if name not in ("attention", *MORE))
    more = tuple(name for name in MORE if name in (args.only or ()))
    return TINY + others[1:] if args.tiny else (*TRAINING, *others, *more)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="; ".join((*TRAINING, *OTHERS, *MORE[:1]))
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each test")
    parser.add_argument("--quick", action="store_true", help="one round, PyTorch without compile")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does the bench run?")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = 1
    unknown = sorted(set(args.only or ()) - set(names_of(args)))
    if unknown or args.repeats < 1:
        parser.error(f"--only {' '.join(unknown)}: there are {', '.join(names_of(args))}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    results: list[Result] = []
    failed: list[str] = []
    where = measure.machine()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unime_bench_") as scratch:
        bench = Bench(args, pathlib.Path(scratch))
        for name in names_of(args):
            if args.only and name not in args.only:
                continue
            start = time.perf_counter()
            print(f"{name} ...", flush=True)
            try:
                found = OTHERS[name](bench) if name in OTHERS else training(name, bench)
            except Missing as missing:
                print(f"  left out, needs {missing}")
                continue
            except WorkerError as error:
                failed.append(name)
                print(f"  failed: {error}", flush=True)
                continue
            results += found
            print(measure.table(found), f"({time.perf_counter() - start:.0f} s)", flush=True)
            measure.write_json(args.output / "results.json", where, results)
    text = f"{measure.table(results)}\n\n{measure.notes(results)}\n"
    print(f"\n{text}")
    (args.output / "results.md").write_text(text)
    measure.plot(args.output / "results.png", results, where)
    print(f"written: {args.output}/results.json, results.md, results.png")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
