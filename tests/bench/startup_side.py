"""Where the time to a run's first step goes: `startup_side.py ARGUMENTS OF TRAIN`.

Runs `unime_jax.train` up to its first finished step and prints the parts as JSON: imports, reading
the model, opening the data, and of the first step: tracing, lowering to MLIR, compiling (or reading
the compiled program from the cache), and the rest, which is the step itself and its first batch.
"""

import json
import os
import sys
import time

START = time.perf_counter()


class FirstStep(Exception):
    """Ends the run."""


def main(argv: list[str]) -> None:
    import jax

    from unime_jax import embedder, loop, train, train_data
    from unime_jax.planning import flops

    parts = {"imports": time.perf_counter() - START}
    spent = {"trace": 0.0, "lower": 0.0, "compile": 0.0, "cache": 0.0}
    names = {
        "/jax/core/compile/jaxpr_trace_duration": "trace",
        "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
        "/jax/core/compile/backend_compile_duration": "compile",
        "/jax/compilation_cache/cache_retrieval_time_sec": "cache",
    }

    def listen(event: str, seconds: float, **_) -> None:
        if event in names:
            spent[names[event]] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)

    def timed(owner, name: str, part: str) -> None:
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                parts[part] = parts.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, name, wrapper)

    timed(embedder, "build", "model")
    timed(train, "open_data", "data")
    timed(flops, "count", "counting operations")
    timed(train_data.TrainData, "batches", "batches")
    before_steps = {}
    steps = loop.Loop._steps

    def begin(self, *args):
        parts["until the loop"] = time.perf_counter() - START
        before_steps.update(spent)
        return steps(self, *args)

    loop.Loop._steps = begin
    loop.Loop._record = lambda *_: (_ for _ in ()).throw(FirstStep)
    quiet = open(os.devnull, "w")  # noqa: SIM115
    stdout, sys.stdout = sys.stdout, quiet
    try:
        train.main(argv)
    except FirstStep:
        sys.stdout = stdout
    parts["total"] = time.perf_counter() - START
    parts["loop's first step"] = parts["total"] - parts["until the loop"]
    parts |= {f"of all: {name}": seconds for name, seconds in spent.items()}
    parts |= {f"of the first step: {name}": spent[name] - before_steps[name] for name in spent}
    print(json.dumps(parts))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv)
