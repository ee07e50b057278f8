"""Training steps of both sides, in turns; first they show that they compute the same."""

import dataclasses
from typing import Any

import bench as shared
import measure
import numpy as np
import workers
from bench import Bench
from measure import Result
from workers import Worker, WorkerError

PARITY = 1e-4  # see _parity
HALF_PARITY = 2e-2  # the same in bfloat16
TRACED = 60.0  # seconds of the longest step that is traced: smaller ones have the same kernels
TOGETHER = (measure.SIDES,)
APART = tuple((side,) for side in measure.SIDES)


@dataclasses.dataclass
class Ways:
    """PyTorch's ways of taking a step, each in a process that was alone.

    Attributes:
      best: the fastest; "": none.
      tried: way -> what its process said, and `seconds` of a step.
      left_out: way -> why it did not run.
    """

    best: str = ""
    tried: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def notes(self) -> dict[str, Any]:
        return {measure.LEFT_OUT: self.left_out} if self.left_out else {}


@dataclasses.dataclass
class Timed:
    """The steps that count.

    Attributes:
      found: side -> what each step said.
      said: side -> what its process said else, its peak memory too.
      notes: what a traced step's time went to; how both sides shared the card.
    """

    found: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    said: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def training(name: str, bench: Bench) -> list[Result]:
    """Times a training step; both sides first show that they compute the same."""
    folder = bench.scratch / name
    bench.prepare(name, folder)
    settings = workers.read_json(folder / "case.json")
    case = settings["case"]
    bench.share = shared.ALONE
    ways = _ways(name, case, bench) if case["torch"] else Ways()
    if not ways.best:
        return _alone(name, case, ways, bench)
    worker = bench.side(name)
    first = worker.ready | worker.close()
    limit = PARITY if settings["model"]["dtype"] == "float32" else HALF_PARITY
    said = first["first"], ways.tried[ways.best]["first"]
    if not _parity(*said) <= limit:  # so that NaN does not pass
        raise WorkerError(
            f"the sides differ by {_parity(*said):.1e} ({said[0]} and {said[1]}): nothing was timed"
        )
    timed = _timed(name, first, ways, bench)
    found = timed.found
    speeds = {side: [case["rows"] / x["seconds"] for x in found[side]] for side in found}
    notes = {
        "PyTorch's fastest": ways.best,
        **ways.notes,
        "seconds a step": {side: measure.median([x["seconds"] for x in found[side]])
                           for side in found},
        "first step differs by": _parity(*said),
        f"step {bench.repeats + 2} by": _parity(*(found[side][-1] for side in measure.SIDES)),
        **_starts(first, timed.said, ways),
        **_shares(timed.said["ours"], found["ours"]),
        **timed.notes,
    }  # fmt: skip
    memory = {side: [timed.said[side]["peak_gib"]] for side in measure.SIDES}
    return [
        Result(name, case["title"], case["unit"], speeds, notes),
        Result(f"{name}_memory", "  its peak memory", "GiB", memory),
    ]


def _alone(name: str, case: dict[str, Any], ways: Ways, bench: Bench) -> list[Result]:
    """Times a step that PyTorch's side does not have, after the one that compiled."""
    timed = _steps(name, (("ours",),), "", bench, warm=0)
    found, said = timed.found["ours"], timed.said["ours"]
    speeds = {"ours": [case["rows"] / x["seconds"] for x in found]}
    notes = {
        **ways.notes,
        "seconds a step": measure.median([x["seconds"] for x in found]),
        f"first call{said['known']}, s": said["first_seconds"],
        **_shares(said, found),
        **timed.notes,
    }
    return [
        Result(name, case["title"], case["unit"], speeds, notes),
        Result(f"{name}_memory", "  its peak memory", "GiB", {"ours": [said["peak_gib"]]}),
    ]


def _ways(name: str, case: dict[str, Any], bench: Bench) -> Ways:
    """Tries PyTorch's ways, one after the other: together they would not fit a card.

    Raises:
      WorkerError: none runs, and not for want of memory.
    """
    ways = Ways()
    for variant in bench.variants(case):
        limit = bench.compile_limit if variant.endswith("compile") else workers.LIMIT
        try:
            worker = bench.side(name, variant, limit=limit)
            seconds = worker.step()["seconds"]
            ways.tried[variant] = {**worker.ready, "seconds": seconds, **worker.close()}
        except WorkerError as error:
            ways.left_out[variant] = workers.why(error)
            print(f"  PyTorch, {variant}: left out: {workers.last_line(error)}", flush=True)
            continue
        print(f"  PyTorch, {variant}: {seconds:.3g} s a step", flush=True)
    if ways.tried:
        ways.best = min(ways.tried, key=lambda way: ways.tried[way]["seconds"])
    elif set(ways.left_out.values()) != {workers.OUT_OF_MEMORY}:
        raise WorkerError(f"no way of PyTorch runs: {ways.left_out}")
    return ways


def _timed(name: str, first: dict[str, Any], ways: Ways, bench: Bench) -> Timed:
    """Lets the sides take turns, or one act after the other where a card does not hold both."""
    if bench.torch_device == "cpu":
        return _steps(name, TOGETHER, ways.best, bench)
    best = ways.tried[ways.best]
    card, held = best["card_gib"], {"ours": first["peak_gib"], "torch": best["reserved_gib"]}
    share = shared.share(card, **held)
    note = {"card, GiB": card, "held alone": held}
    if share is not None:
        bench.share = share
        try:
            timed = _steps(name, TOGETHER, ways.best, bench)
            timed.notes["memory of the card"] = {**note, "ours may take": share * card}
            return timed
        except WorkerError as error:
            print(f"  not both on the card: {workers.last_line(error)}", flush=True)
            bench.end_workers()
    bench.share = shared.ALONE
    timed = _steps(name, APART, ways.best, bench)
    timed.notes["memory of the card"] = {**note, "turns": "none: ours first, alone, then PyTorch"}
    return timed


def _steps(name: str, turns, best: str, bench: Bench, warm: int = 1) -> Timed:
    """Lets sides act.

    Args:
      turns: sides that take turns, and then other sides.
      best: PyTorch's way.
      warm: steps of each side that do not count.
    """
    timed = Timed()
    for sides in turns:
        pair = {side: bench.side(name, best if side == "torch" else "") for side in sides}
        timed.found |= workers.take_turns(pair, bench.repeats, warm=warm)
        for side in reversed(sides):  # what is traced comes last and has the card for itself
            timed.said[side] = pair[side].ready | pair[side].memory()
            if bench.device == "gpu" and side == "ours":
                timed.notes |= _traced(pair[side], timed.found[side])
            pair[side].kill()
    return timed


def _traced(worker: Worker, found) -> dict[str, Any]:
    """Says what a step's time goes to, on a GPU; a profiler's faults lose no figures."""
    if found[-1]["seconds"] > TRACED:
        return {"not traced": f"a step takes more than {TRACED:.0f} s"}
    try:
        return {key: shares for key, shares in worker.trace().items() if shares}  # none on CPU
    except WorkerError as error:
        return {"not traced": workers.why(error)}


def _starts(first: dict[str, Any], said: dict[str, Any], ways: Ways) -> dict[str, Any]:
    """Says what first steps took, of every side and way."""
    found = {way + one["known"]: one for way, one in ways.tried.items()}
    found[ways.best + said["torch"]["known"]] = said["torch"]
    found = {f"ours{one['known']}": one for one in (first, said["ours"])} | found
    names = {
        "first call, s": "first_seconds",
        "peak GiB": "peak_gib",
        "peak until the first step's end, GiB, with the compiler's processes": "start_gib",
    }
    return {
        text: {way: one[key] for way, one in found.items() if one[key] is not None}
        for text, key in names.items()
    }


def _shares(said: dict[str, Any], found) -> dict[str, Any]:
    """Says what was planned, and what share of the device's peak rate a step of ours reached."""
    seconds = measure.median([x["seconds"] for x in found])
    notes = {"planned peak, GiB": said["planned_gib"]} if "planned_gib" in said else {}
    if "operations" in said:
        notes["PFLOP a step"] = {kind: one / 1e15 for kind, one in said["operations"].items()}
    if said.get("peak_rate"):
        notes["MFU"] = {
            kind: one / seconds / said["peak_rate"] for kind, one in said["operations"].items()
        }
    return notes


def _parity(ours: dict[str, Any], torch: dict[str, Any]) -> float:
    """Largest relative difference of loss and gradient norm, or the vectors' cosine distance."""
    if "rows" in torch:
        a, b = np.array(ours["rows"]), np.array(torch["rows"])
        return float(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    names = ("loss", "gradient_norm")
    return float(np.max([abs(ours[name] / torch[name] - 1) for name in names]))  # NaN stays
