"""How the processes of a run find each other.

A run is one process a host, all with the same command. They find each other on SLURM, Cloud TPU,
GKE and under Open MPI; elsewhere each is told where it stands, by flags or by the environment:

    --coordinator=HOST:PORT --processes=N --process=I
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID
"""

import contextlib
import glob
import os
import re
import socket
import sys
import threading
import warnings

from unime_jax.types import UserError

_FLAGS = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}
_PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")
_JOIN_SECONDS = 300


def take_flags(argv: list[str]) -> list[str]:
    """Moves the flags that place a process among others into the environment."""
    rest = []
    for argument in argv:
        found = re.fullmatch(r"--?(coordinator|processes|process)=(.*)", argument)
        if found:
            os.environ[_FLAGS[found[1]]] = found[2]
        else:
            rest.append(argument)
    return rest


def join() -> None:
    """Connects with the other processes of the run, if there are any."""
    import jax

    if jax.distributed.is_initialized():
        return
    given = {key: os.environ.get(name, "") for key, name in _FLAGS.items()}
    announced = _announced()
    if not any(given.values()) and (announced == 1 or (not announced and _is_lone_pod())):
        return
    timeouts = {"initialization_timeout": _JOIN_SECONDS + 60, "shutdown_timeout_seconds": 60}
    try:
        with _told_to_wait(_JOIN_SECONDS), _without_proxies():
            if any(given.values()):
                _join_given(given, timeouts)
                return
            _share_gpus_of_slurm()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Kubernetes without its package: not for us
                jax.distributed.initialize(**timeouts)
    except UserError:
        raise
    except Exception as error:  # of gRPC, of Kubernetes: each its own kind
        # No cluster that JAX knows, or JAX is at work already, in a notebook for instance.
        alone = re.search("coordinator_address|must be called before", str(error))
        if alone and not any(given.values()) and announced < 2:
            return
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the other processes are not found: {reason} (each may be told where it stands: "
            "--coordinator=HOST:PORT --processes=N --process=I)"
        ) from None


def _announced() -> int:
    """Returns how many processes the environment of a cluster speaks of; 0: it does not."""
    given = os.environ.get
    if given("OMPI_COMM_WORLD_SIZE"):
        return int(given("OMPI_COMM_WORLD_SIZE"))
    if given("SLURM_STEP_NODELIST"):
        return int(given("SLURM_NTASKS") or 0)
    hosts = given("TPU_PROCESS_ADDRESSES") or given("TPU_WORKER_HOSTNAMES") or ""
    slices = int(given("MEGASCALE_NUM_SLICES") or 1)
    return slices * len(hosts.split(",")) if hosts else 0


def _is_lone_pod() -> bool:
    """Says whether this is a Kubernetes pod of no indexed job: JAX would look for its job."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ


def check_own_name() -> None:
    """Checks that this machine's own name has an address: others are given that to call back."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:  # the second of a part that is empty or too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"this machine's name, {name}, has no address, at which the other processes would find "
            f"it ({reason}): add a line with both to /etc/hosts"
        ) from None


def environment_alone() -> dict[str, str]:
    """Returns the environment of a child that is not to join the processes of its parent."""
    ours = (*_FLAGS.values(), "JAX_LOCAL_DEVICE_IDS")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith(("SLURM_", "OMPI_"))
    }


@contextlib.contextmanager
def _without_proxies():
    """Hides HTTP proxies: gRPC would ask them for the other processes, and wait for ever."""
    names = [name for name in os.environ if name.lower() in _PROXIES]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _told_to_wait(seconds: int | float):
    """Says after a while that the other processes are missing, and ends when they stay away.

    Left alone, JAX would end the process with a stack trace.
    """

    def fail():
        print(
            f"error: after {seconds:.0f} s not all processes are there: start as many as were "
            "announced, all with the same address of process 0, which must reach it",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    def remind():
        print("waiting for the other processes ...", file=sys.stderr, flush=True)

    timers = [threading.Timer(min(10, seconds / 2), remind), threading.Timer(seconds, fail)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _join_given(given: dict[str, str], timeouts: dict[str, int]) -> None:
    import jax

    for key, value in given.items():
        if not (re.fullmatch(r".+:\d+", value) if key == "coordinator" else value.isdigit()):
            raise UserError(
                f"--{key}={value}: several processes need --coordinator=HOST:PORT (of process 0), "
                f"--processes=N and --process=0 to N-1 (or {', '.join(_FLAGS.values())})"
            )
    count, number = int(given["processes"]), int(given["process"])
    if number >= count:
        raise UserError(f"--process={number}: must be below --processes={count}")
    jax.distributed.initialize(
        given["coordinator"], count, number, cluster_detection_method="deactivate", **timeouts
    )


def _share_gpus_of_slurm() -> None:
    """Gives a node's only task all its GPUs; JAX would take one a task."""
    if re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        count = os.environ.get("SLURM_GPUS_ON_NODE") or len(glob.glob("/dev/nvidia[0-9]*"))
        if int(count):
            os.environ.setdefault("JAX_LOCAL_DEVICE_IDS", ",".join(map(str, range(int(count)))))
