"""Runs of the toy in processes of their own, for tests that kill, stop and starve them.

A run takes steps of the toy model with dropout and saves after each. A server imports everything
once and forks a process for each run, so that a start costs a tenth of a second, not five.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import processes

ROOT = pathlib.Path(__file__).parents[1]


class Server:
    """Starts runs; one at a time."""

    def __init__(self, cache):
        env = {**processes.environment(1), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, directory, steps: int, log, **options) -> int:
        """Starts a run and returns its process; `finish` is to be called before the next.

        Args:
          directory: of the run.
          steps: of the whole run.
          log: file that takes what it says.
          options: `die`: name of an event of a save at which it kills itself, see `EVENTS`;
            `seed`: of the run.
        """
        asked = {"directory": str(directory), "steps": steps, "log": str(log), **options}
        self._process.stdin.write(f"{asked!r}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def finish(self) -> int:
        """Waits for the run and returns its exit code, negative after a signal."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def run(self, directory, steps: int, log, **options) -> int:
        self.start(directory, steps, log, **options)
        return self.finish()

    def close(self) -> None:
        self._process.communicate(timeout=60)


def wait_for_line(directory, process: int, number: int, seconds: float = 60) -> bool:
    """Waits until a run has logged so many steps; False if it ended before."""
    path, until = pathlib.Path(directory) / "metrics.jsonl", time.monotonic() + seconds
    while time.monotonic() < until:
        if path.is_file() and path.read_bytes().count(b"\n") >= number:
            return True
        if pathlib.Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
            return False
        time.sleep(0.005)
    raise AssertionError(f"no step {number} within {seconds} s: {path}")


# Moments of a save, by the function that is called then and in which file.
EVENTS = ("before_manifest", "half_a_manifest", "before_name", "after_name", "half_removed")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(event: str) -> None:
    """Makes this process kill itself at an event of its second save."""
    from unime_jax.checkpoint import integrity

    saves, write, rename, remove = [0], integrity.write_manifest, os.rename, os.unlink

    def manifest(directory, **notes):
        saves[0] += 1
        if saves[0] == 2 and event == "before_manifest":
            _die()
        write(directory, **notes)
        if saves[0] == 2 and event == "half_a_manifest":
            path = directory / integrity.MANIFEST
            path.write_bytes(path.read_bytes()[:100])
            _die()

    def named(source, target, **options):
        last = saves[0] == 2 and pathlib.Path(target).name.isdigit()
        if last and event == "before_name":
            _die()
        rename(source, target, **options)
        if last and event == "after_name":
            _die()

    def removed(path, **options):
        if saves[0] >= 2 and event == "half_removed" and "manifest" in str(path):
            _die()
        remove(path, **options)

    integrity.write_manifest, os.rename, os.unlink = manifest, named, removed


def _train(directory: str, steps: int, log: str, die: str = "", seed: int = 0) -> None:
    import jax
    import test_loop
    import toy
    from test_steps import parts

    from unime_jax import checkpoint, loop, runtime, sharding
    from unime_jax.config import base_config

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    if die:
        _arm(die)

    class Data(test_loop.Data):
        def __init__(self):
            super().__init__()
            self.steps = steps

        def batches(self, first):
            return (toy.batch(seed=step) for step in range(first, self.steps))

    def main(argv):
        settings = base_config().to_dict()
        settings["output"] = directory
        settings["log"] |= {"tensorboard": False}
        runtime.start()
        with checkpoint.lock(directory):
            checkpoint.open_run(directory, settings)
            mesh = sharding.make_mesh(devices=jax.devices()[:1])
            _, state, frozen, step = parts(dropout=True, mesh=mesh, seed=seed)
            saves = checkpoint.Checkpoints(directory, config=settings, every_steps=1)
            loop.Loop(settings, step, frozen, Data(), saves, None, mesh).run(state)

    runtime.run_entry(main, ["toy"])


def final(directory) -> dict[str, np.ndarray]:
    """Returns all arrays of a run's newest checkpoint, optimiser's and step included."""
    import orbax.checkpoint as ocp

    from unime_jax.checkpoint import integrity

    checkpoints = pathlib.Path(directory) / "checkpoints"
    newest = checkpoints / str(max(integrity.steps(checkpoints)))
    assert integrity.find_problem(newest) == ""
    found = {}
    for item in ("trainable", "rest"):
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.restore(newest / item)
        import jax

        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[f"{item}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return found


def _serve() -> None:
    import ast

    # Everything that a run imports, and nothing that starts a thread.
    import grain  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import test_loop  # noqa: F401
    import test_steps  # noqa: F401

    for line in sys.stdin:
        asked = ast.literal_eval(line)
        process = os.fork()
        if process == 0:
            sys.stdin.close()
            try:
                _train(**asked)
            except SystemExit as error:
                os._exit(error.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        print(process, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
