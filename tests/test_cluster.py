"""How processes find each other: flags, what clusters export, proxies, one process alone."""

import os
import socket
import subprocess
import sys
import time
import types
from unittest import mock

import jax
import processes
import pytest

from unime_jax import cluster, runtime
from unime_jax.types import UserError

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def test_flags_that_place_a_process_are_taken_by_every_entry(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.setenv(name, "")
    rest = []
    argv = ["x", "--coordinator=h:1", "--config.a=1", "--processes=2", "--process=0"]
    runtime.run_entry(rest.extend, argv)
    assert rest == ["x", "--config.a=1"]
    assert os.environ["JAX_COORDINATOR_ADDRESS"] == "h:1"
    assert (os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_PROCESS_ID"]) == ("2", "0")


@pytest.mark.parametrize(
    "coordinator, processes, process, message",
    [
        ("host", "2", "0", "--coordinator=host: several processes need"),
        ("host:1", "", "0", "--processes=: several"),
        ("", "2", "0", "--coordinator=: several"),
        ("host:1", "2", "x", "--process=x: several"),
        ("host:1", "2", "2", "--process=2: must be below --processes=2"),
    ],
)
def test_a_process_that_is_misplaced_is_told(coordinator, processes, process, message):
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    with pytest.raises(UserError, match=message):
        cluster._join_given(given, {})


def test_a_process_that_waits_in_vain_says_so(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with cluster._told_to_wait(0.1):
        time.sleep(0.5)
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("waiting for") and "not all processes are there" in said[1]
    assert ended == [2]
    with cluster._told_to_wait(0.1):
        pass
    time.sleep(0.3)
    assert capfd.readouterr().err == "" and ended == [2]


@pytest.mark.parametrize("tasks, found", [("1(x2)", "0,1,2,3"), ("1", "0,1,2,3"), ("4(x2)", "")])
def test_a_nodes_only_task_gets_all_its_gpus(tasks, found, monkeypatch):
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "")
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    cluster._share_gpus_of_slurm()
    assert os.environ.get("JAX_LOCAL_DEVICE_IDS", "") == found


@pytest.fixture
def asked(monkeypatch):
    """Calls of `jax.distributed.initialize`, which finds no cluster."""
    calls = []

    def initialize(*args, **options):
        calls.append({name for name in os.environ if name.lower().endswith("_proxy")})
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return calls


def test_a_proxy_is_not_asked_for_other_processes(asked, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "elsewhere")
    cluster.join()
    assert asked == [{"no_proxy"}]
    assert os.environ["HTTP_PROXY"] == "http://127.0.0.1:9"


TALK = """
import os, sys
from unime_jax import cluster, runtime
cluster.take_flags(sys.argv)
runtime.start()
answers = {runtime.from_main(f"{call} of {os.getpid()}") for call in range(250)}
runtime.barrier()
assert len(answers) == 250 and runtime.from_main("last") == "last"
kept = runtime._messages().key_value_dir_get(runtime._SAID)
print(len(kept), *sorted({answer.split()[-1] for answer in answers}), file=sys.stderr)
"""


def test_two_processes_behind_a_proxy_hear_the_first_and_nothing_piles_up():
    place = [f"--coordinator=127.0.0.1:{processes.free_port()}", "--processes=2"]
    env = {**os.environ, "http_proxy": "http://127.0.0.1:9"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TALK, *place, f"--process={number}"],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=100)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert said == [f"1 {started[0].pid}\n"] * 2


@pytest.mark.parametrize(
    "environment, alone",
    [
        (SLURM, True),
        ({**SLURM, "SLURM_NTASKS": "2"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, False),
        ({"KUBERNETES_SERVICE_HOST": "a"}, True),
    ],
)
def test_one_process_of_a_cluster_asks_nobody(environment, alone, asked, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if alone:
        cluster.join()
    else:  # and several never run alone, each as the first
        with pytest.raises(UserError, match="not found"):
            cluster.join()
    assert bool(asked) != alone


def test_several_processes_where_jax_is_at_work_already_are_an_error(monkeypatch):
    jax.devices()
    for name, value in {**SLURM, "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="not found.*before"):
        cluster.join()


def test_faults_of_a_cluster_are_one_line(monkeypatch):
    def initialize(**_):
        raise LookupError("no\ntoken")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="not found: no token"):
        cluster.join()


def test_a_machine_that_does_not_know_its_own_name_is_told_so(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cpu': gloo/transport/tcp/device.cc -2")

    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the cache of the tests stays
    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(socket, "gethostname", lambda: "nobody")
    with monkeypatch.context() as known:
        known.setattr(socket, "getaddrinfo", lambda *_: [])
        with pytest.raises(UserError, match="no such devices here .*gloo"):
            runtime.start()
    for error, said in (
        (socket.gaierror(-2, "Name or service not known"), "not known"),
        (UnicodeError("label empty or too long"), "label empty"),  # of no possible name
    ):
        monkeypatch.setattr(socket, "getaddrinfo", mock.Mock(side_effect=error))
        with pytest.raises(UserError, match=f"name, nobody, has no address.*{said}.*etc/hosts"):
            runtime.start()


def test_gpus_that_were_asked_for_and_are_not_seen_are_told(monkeypatch):
    """JAX goes on with the CPU."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the cache of the tests stays
    devices = [types.SimpleNamespace(platform="cpu")]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    with pytest.raises(UserError, match="^JAX_PLATFORMS=cuda,cpu: no such devices .*cuda12 or tpu"):
        runtime.start()


def test_a_child_is_on_its_own(monkeypatch):
    for name in (*SLURM, "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = cluster.environment_alone()
    assert found["JAX_PLATFORMS"] == "cpu" and "PATH" in found
    assert not [name for name in found if name.startswith(("SLURM_", "OMPI_", "JAX_PROCESS"))]
