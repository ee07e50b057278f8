"""Launch scripts: syntax, what they would run, and that what they name is there."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from unime_jax import config

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])
STARTERS = [path for path in SCRIPTS if path.name in ("gpu_node.sh", "slurm.sbatch", "tpu_pod.sh")]
FLAGS = ["--config", "configs/llava16_stage2.py", "--config.model.path=my model"]


def bash(*command, **env):
    return subprocess.run(
        ["bash", *map(str, command)],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **env},
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(path):
    done = bash("-n", path)
    assert done.returncode == 0, done.stderr
    near = pathlib.Path(sys.executable).parent / "shellcheck"
    checker = str(near) if near.is_file() else shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed (dev extra)")
    done = subprocess.run(
        [checker, "-x", "--severity=warning", str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.name)
def test_a_dry_run_prints_exports_and_one_command(path):
    assert len(STARTERS) == 3
    done = bash(path, "--dry-run", *FLAGS, JAX_PLATFORMS="")
    chips = "tpu" if path.name == "tpu_pod.sh" else "cuda"
    assert f'export JAX_PLATFORMS="{chips},cpu"\n' in done.stdout
    *exports, command = done.stdout.splitlines()
    assert exports and all(line.startswith("export ") for line in exports)
    found = shlex.split(command)
    at = found.index("python")
    assert found[at : at + 2] == ["python", "-m"] and found[at + 3 :] == FLAGS
    module = found[at + 2].split(".")
    assert ROOT.joinpath(*module).with_suffix(".py").is_file()
    assert "config" not in path.read_text().split("run ")[-1], "no hyper-parameters in scripts"
    env = {"DRY_RUN": "1", "JAX_PLATFORMS": ""}
    assert bash(path, *FLAGS, **env).stdout == done.stdout
    other = bash(path, *FLAGS, **env, ENTRY="teach").stdout
    assert other == done.stdout.replace("unime_jax.train", "unime_jax.teach")


def test_what_is_exported_already_stays():
    done = bash(
        ROOT / "launch/gpu_node.sh",
        "--dry-run",
        XLA_PYTHON_CLIENT_MEM_FRACTION=".5",
        JAX_PLATFORMS="x",
    )
    assert (
        "JAX_PLATFORMS" not in done.stdout
        and "MEM_FRACTION" not in done.stdout
        and "NCCL_DEBUG" in done.stdout
    )


@pytest.mark.parametrize("code, queued", [(0, False), (85, True), (2, False)])
def test_slurm_queues_a_stopped_run_again(tmp_path, code, queued):
    """With stand-ins for srun and scontrol; srun returns its tasks' code if none is killed."""
    for name, body in (
        ("srun", f'echo "$UNIME_JAX_STOP_CODE $1"; exit {code}'),
        ("scontrol", 'echo "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = bash(ROOT / "launch/slurm.sbatch", *FLAGS, PATH=path, SLURM_JOB_ID="7")
    assert done.returncode == code
    assert done.stdout.split("\n")[:-1] == ["85 --kill-on-bad-exit=0"] + ["requeue 7"] * queued


def test_the_jobset_names_what_is_there():
    content = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())
    assert (content["apiVersion"], content["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", content["metadata"]["name"])
    assert set(content["spec"]) == {"failurePolicy", "replicatedJobs"}
    (job,) = content["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    assert spec["parallelism"] == spec["completions"] == rows * columns // chips
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    # A pod that saves and ends fails, so that the set starts again.
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(env["UNIME_JAX_STOP_CODE"]) > 2 and content["spec"]["failurePolicy"]["maxRestarts"]
    assert all(isinstance(value, str) for value in env.values())
    assert pod["restartPolicy"] == "Never" and spec["backoffLimit"] == 0
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    shell, script = container["command"]
    assert shell == "bash" and ROOT / script in STARTERS
    flags = [flag.replace("=configs/", f"={ROOT}/configs/") for flag in container["args"]]
    config.parse(["train", *flags], "doc")  # every key is known
