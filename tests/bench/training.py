"""Training steps of both sides, in turns; first they show that they compute the same."""

import pathlib
from typing import Any

import measure
import numpy as np
import workers
from bench import Bench
from measure import Result
from workers import Worker, WorkerError

PARITY = 1e-4  # of loss and gradient norm, relative
HALF_PARITY = 2e-2  # the same in bfloat16


def training(name: str, bench: Bench) -> list[Result]:
    """Times a training step; both sides first show that they compute the same."""
    folder = bench.scratch / name
    bench.prepare(name, folder)
    settings = workers.read_json(folder / "case.json")
    case = settings["case"]
    bench.alone = not case["torch"]
    compiled = bench.kept / "compiled" / name
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    known = compiled.exists()  # by an earlier run with the same --scratch
    ours = bench.worker("jax_side.py", str(folder), env=cache)
    if bench.alone:
        return _alone(name, case, ours, bench, known)
    cold = None
    if not known:
        cold = ours.ready | ours.close()
        ours = bench.worker("jax_side.py", str(folder), env=cache)  # as most runs are
    variant, torch, tried, left_out = _fastest(folder, case, bench)
    difference = _parity(ours.ready["first"], torch.ready["first"])
    limit = PARITY if settings["model"]["dtype"] == "float32" else HALF_PARITY
    if not difference <= limit:  # so that NaN does not pass
        raise WorkerError(
            f"the sides differ by {difference:.1e} ({ours.ready['first']} and "
            f"{torch.ready['first']}): nothing was timed"
        )
    ours.step()  # as PyTorch's took one when it was chosen: both have taken as many
    found = workers.take_turns({"ours": ours, "torch": torch}, bench.repeats, warm=1)
    traced = _traced(ours, bench)
    peaks = {"ours": ours.close()["peak_gib"], "torch": torch.close()["peak_gib"]}
    last = _parity(*(found[side][-1] for side in measure.SIDES))
    speeds = {side: [case["rows"] / x["seconds"] for x in found[side]] for side in found}
    unit = "sentences/s" if case["stage"] == "distill" else "pairs/s"
    notes = {
        "PyTorch's fastest": variant,
        **({"left out": left_out} if left_out else {}),
        "seconds a step": {side: measure.median([x["seconds"] for x in found[side]])
                           for side in found},
        "first step differs by": difference,
        f"step {bench.repeats + 3} by": last,
        "first call, s": {**({"ours": cold["first_seconds"]} if cold else {}),
                          "ours, compiled before": ours.ready["first_seconds"],
                          **{key: value["first_seconds"] for key, value in tried.items()}},
        "peak GiB": {**({"ours, when it compiles": cold["peak_gib"]} if cold else {}),
                     **{key: one.get("peak_gib", peaks["torch"]) for key, one in tried.items()}},
        **_shares(ours, found["ours"]), **traced,
    }  # fmt: skip
    memory = {side: [peak] for side, peak in peaks.items()}
    return [
        Result(name, case["title"], unit, speeds, notes),
        Result(f"{name}_memory", "  its peak memory", "GiB", memory),
    ]


def _alone(name: str, case, ours: Worker, bench: Bench, known: bool) -> list[Result]:
    """Times a step that PyTorch's side does not have, after the one that compiled."""
    found = workers.take_turns({"ours": ours}, bench.repeats, warm=0)["ours"]
    traced = _traced(ours, bench)
    peak = ours.close()["peak_gib"]
    speeds = {"ours": [case["rows"] / x["seconds"] for x in found]}
    note = {
        "seconds a step": measure.median([x["seconds"] for x in found]),
        f"first call{', compiled before' * known}, s": ours.ready["first_seconds"],
        **_shares(ours, found),
        **traced,
    }
    return [
        Result(name, case["title"], "rows/s", speeds, note),
        Result(f"{name}_memory", "  its peak memory", "GiB", {"ours": [peak]}),
    ]


def _shares(ours: Worker, found) -> dict[str, Any]:
    """Says what was planned, and what share of the device's peak rate a step reached."""
    said, seconds = ours.ready, measure.median([x["seconds"] for x in found])
    notes = {"planned peak, GiB": said["planned_gib"]} if "planned_gib" in said else {}
    if "operations" in said:
        notes["PFLOP a step"] = {kind: one / 1e15 for kind, one in said["operations"].items()}
    if said.get("peak_rate"):
        notes["MFU"] = {
            kind: one / seconds / said["peak_rate"] for kind, one in said["operations"].items()
        }
    return notes


def _traced(ours: Worker, bench: Bench) -> dict[str, Any]:
    """Says what a step's time goes to, on a GPU."""
    found = ours.trace() if bench.device == "gpu" else {}
    return {key: shares for key, shares in found.items() if shares}  # none on CPU


def _fastest(folder: pathlib.Path, case: dict[str, Any], bench: Bench):
    """Returns PyTorch's fastest way, its worker, and what each way took or why it was left out."""
    tried: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    running: dict[str, Worker] = {}
    for variant in bench.variants(case):
        limit = bench.compile_limit if variant.endswith("compile") else workers.LIMIT
        try:
            worker = bench.worker(
                "torch_side.py", str(folder), variant, bench.torch_device, limit=limit
            )
            seconds = worker.step()["seconds"]
        except WorkerError as error:
            left_out[variant] = workers.last_line(error)
            print(f"  PyTorch, {variant}: left out: {left_out[variant]}", flush=True)
            continue
        running[variant] = worker
        tried[variant] = {"seconds": seconds, "first_seconds": worker.ready["first_seconds"]}
        print(f"  PyTorch, {variant}: {seconds:.2f} s a step", flush=True)
        best = min(tried, key=lambda name: tried[name]["seconds"])
        for loser in [name for name in running if name != best]:
            tried[loser] |= running.pop(loser).close()
    if not running:
        raise WorkerError(f"no way of PyTorch runs: {left_out}")
    (best, worker), *_ = running.items()
    return best, worker, tried, left_out


def _parity(ours: dict[str, float], torch: dict[str, float]) -> float:
    """Largest relative difference of loss and gradient norm."""
    names = ("loss", "gradient_norm")
    return float(np.max([abs(ours[name] / torch[name] - 1) for name in names]))  # NaN stays
