"""Plans: shapes and bytes are those of a run, the tables add up, faults are named."""

import json
import os
import types

import jax
import jax.numpy as jnp
import llava_step
import miniature
import pytest
from jax.sharding import PartitionSpec as P

from unime_jax import config as config_lib
from unime_jax import plan, sharding, steps, train_data
from unime_jax.planning import (
    abstract,
    backbones,
    collectives,
    compiled,
    composition,
    estimate,
    flops,
    memory,
    page,
    planner,
    search,
    topology,
)
from unime_jax.types import UserError

CONFIGS = miniature.ROOT / "configs"


def settings_of(name: str, *flags: str) -> dict:
    return config_lib.parse(["plan", f"--config={CONFIGS / name}", *flags], "doc").to_dict()


def found(name: str, *flags: str):
    """Returns what a plan starts from: settings, the model's files, the batch."""
    settings = settings_of(name, *flags)
    backbone = backbones.find(settings, name)
    model = abstract.model(settings, backbone.config, "xla")
    return settings, backbone, model, composition.find(settings, backbone, model)


def described(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding.spec), tree)


@pytest.mark.parametrize("name", ["phi35v_stage1", "phi35v_stage2", "llava16_judged"])
def test_the_batch_is_the_one_that_training_reads(name):
    settings, backbone, model, made = found(f"{name}.py:smoke")
    assert "assumed" not in made.source
    mesh = sharding.make_mesh(data=4, fsdp=1, devices=jax.devices()[:4])
    run = abstract.run(settings, backbone.config, made, mesh=mesh)
    embedder = composition.Unread(
        model,
        directory=backbone.directory,
        **{key: settings["data"][key] for key in composition.PREPARATION},
    )
    data = train_data.open_data(settings, embedder)
    read = steps.place_batch(next(data.batches(0)), mesh)
    assert described(run.batch) == described(read)
    assert (made.steps, made.sets) == (data.steps, data.sets)
    assert made.real_tokens == data.info.tokens


def test_bytes_are_those_of_the_compiled_program():
    """4-bit codes, adapters, moments and a batch over eight devices, to the byte."""
    settings = settings_of(
        "phi35v_stage1.py", "--config.model.dtype=float32", "--config.train.batch_size=24",
        "--config.train.chunk=0", "--config.train.adapters.rank=4", "--config.mesh.fsdp=2",
        "--config.mesh.data=4", "--config.train.adapters.dropout=0.0", "--config.model.remat=none",
    )  # fmt: skip
    text = {**llava_step.CONFIG["text_config"], "hidden_size": 128, "intermediate_size": 256}
    config = {**llava_step.CONFIG, "text_config": text}
    groups = ((8, 8, 0),)
    made = composition.Composition(
        groups, groups, groups, 8, 3, ("nli",), 0.0, vectors=(24, 16), negative_ids=True
    )
    mesh = sharding.make_mesh(**settings["mesh"])
    run = abstract.run(settings, config, made, mesh=mesh)
    counted = memory.arguments(run)
    idle = memory.idle(run, flops.trace(run.step, *run.arguments)[1])
    program = run.step.lower(*run.arguments).compile()
    assert counted.total - idle == program.memory_analysis().argument_size_in_bytes
    # Ids and places of images are not read by this loss, and the columns of the tiles are empty.
    assert 0 < idle < counted.batch
    assert min(counted.base, counted.adapters, counted.optimiser, counted.batch) > 0
    shape = sharding.abstract_mesh(4, 2, 1)
    assert memory.arguments(abstract.run(settings, config, made, mesh=shape)) == counted


def test_typical_lengths_stand_for_data_that_is_missing():
    settings, backbone, _, made = found("llava16_stage2.py")
    assert backbone.directory is None and made.source.startswith("assumed")
    assert made.rows == 1024 == sum(rows for rows, _, _ in made.query)
    assert {tiles for _, _, tiles in made.query} == {0, 3}
    share = 1 - made.real_tokens / made.padded_tokens
    assert 0 < share < 0.05, share  # 1.5 % were measured on texts of MMEB's lengths
    _, _, _, more = found("llava16_stage2.py", "--config.train.batch_size=512")
    assert more.real_tokens == pytest.approx(made.real_tokens / 2, rel=0.03)
    _, _, _, judged = found("llava16_judged.py")
    assert sum(rows for rows, _, _ in judged.negative) == 8 * 1024 and judged.judged == 8
    _, _, _, nli = found("phi35v_stage1.py")
    assert (nli.rows, nli.vectors, nli.steps) == (256, (768, 4096), 2153)


def run_plan(capsys, *arguments: str) -> str:
    plan.main(["plan", *arguments])
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_plan_adds_up(capsys, monkeypatch):
    monkeypatch.setattr(estimate, "REMATS", ("none", "full"))  # every probe takes seconds
    monkeypatch.setattr(search, "_whole_may_fit", lambda *_: False)
    flags = (f"--config={CONFIGS}/phi35v_stage1.py:smoke", "--topology=a100-80g:2x2", "--search")
    text = run_plan(capsys, *flags, "--json")
    found = json.loads(text)
    sizes = found["arguments"]
    assert sizes["total"] == sum(v for name, v in sizes.items() if name != "total")
    counted = found["flops"]
    assert counted["total"] == pytest.approx(
        sum(counted["needed"].values()) + sum(counted["again"].values())
    )
    assert counted["needed"]["decoder"] > counted["needed"]["loss"] > 0
    seconds = counted["total"] / 4 / (312e12 / 2 * 0.45)  # f32 runs at half the rate
    assert found["estimate"]["products_seconds"] == pytest.approx(seconds)
    assert found["estimate"]["days"] * 86400 == pytest.approx(
        found["steps"] * found["estimate"]["seconds"]
    )
    best = found["recommended"]
    fastest = min(one["seconds"] for one in found["search"])  # scaled from probes
    assert best["fits"] and best["seconds"] <= 1.01 * fastest
    assert {one["remat"] for one in found["search"]} == {"none", "full"}
    # More is kept, less is computed again.
    none, full = (
        next(one for one in found["search"] if (one["chunk"], one["remat"]) == (4, remat))
        for remat in ("none", "full")
    )
    assert none["peak"] > full["peak"] and none["flops"] < full["flops"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e-16"], "v5e:4x4.*a100-80g:8"),
        (["--topology=v5e:4x4", "--mfu=2"], "--mfu=2"),
        (["--topology=v5e:4x4", "--mfu=fast"], "--mfu"),
        (["--topology=v5e:4x4", "--searching"], "--searching|searching"),
        ([], "--topology is missing.*a100-80g:8"),
        (["--topology=v5e:4x4", "--config.mesh.tensor=3"], "config.mesh.tensor=3.*16 devices"),
        (["--topology=v5e:4x4", "--config.train.chunk=7"], "config.train.chunk=7"),
        (["--topology=v5e:4x4", "--config.data.sets=('MSCOCO_x',)"], "MSCOCO_x"),
    ],
)
def test_faults_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        plan.main(["plan", f"--config={CONFIGS}/llava16_stage2.py", *flags])


def test_a_model_that_nobody_knows_is_named(tmp_path):
    settings = settings_of("llava16_stage2.py")
    settings["model"]["path"], settings["output"] = "runs/other", "runs/other"
    settings["data"]["prompt"], settings["train"]["quantize"] = "", None
    with pytest.raises(UserError, match="config.model.path='runs/other'.*config.json"):
        backbones.find(settings, "other.py")
    (tmp_path / "config.json").write_text(json.dumps(llava_step.CONFIG))
    settings["model"]["path"] = str(tmp_path)  # sizes suffice: no weights, no tokenizer
    backbone = backbones.find(settings, "other.py")
    model = abstract.model(settings, backbone.config, "xla")
    made = composition.find(settings, backbone, model)
    assert "tokenizer" in made.source or "data.path" in made.source


def test_the_fastest_settings_are_compiled_until_one_fits():
    """Those that are far too large are left out, and what was measured corrects the estimates."""
    asked = []

    def compile(setting):
        asked.append(setting)
        peak = {(32, "none"): 14.0, (16, "dots"): 9.0}[setting]
        return {"peak": peak, "fits": peak < 10, "seconds": 1.0,
                "chunk": setting[0], "remat": setting[1]}  # fmt: skip

    found = [
        {"chunk": 64, "remat": "none", "peak": 25.0},  # no error of an estimate helps
        {"chunk": 32, "remat": "none", "peak": 12.0},
        {"chunk": 16, "remat": "none", "peak": 9.0},  # too large after the one before
        {"chunk": 16, "remat": "dots", "peak": 9.5},
        {"chunk": 16, "remat": "full", "peak": 2.0},
    ]
    said = []
    tried = search.compile_in_turn(found, compile, base=1.0, limit=10.0, tell=said.append)
    assert asked == [(32, "none"), (16, "dots")]
    assert [one["fits"] for one in tried] == [False, True]
    assert "does not fit" in said[0] and "chunk 16, remat dots" in said[1]


def searched(monkeypatch, peaks: dict, found: list[dict], base: float = 1.0):
    """Returns what a search compiles of settings with these compiled peaks, and what it prints."""
    made = object.__new__(planner._Planner)
    made._arguments = memory.Arguments(base, 0.0, 0.0, 0.0)
    made.estimator = types.SimpleNamespace(limit=10.0)
    made.setting, made._limit = (0, "none"), dict
    monkeypatch.setattr(search, "candidates", lambda *_: found)
    asked, said = [], []

    def compile(setting, tell, how):
        assert how == "kinds"
        asked.append(setting)
        peak = peaks[setting]
        return {"compiled": {"peak": peak, "fits": peak < 10, "seconds": 1.0,
                             "chunk": setting[0], "remat": setting[1]}}  # fmt: skip

    made.compile = compile
    result = made.search("kinds", said.append)
    return asked, said, page.search({**result, "chunk": 0, "remat": "none"})


def candidates(*settings: tuple[int, str, float]) -> list[dict]:
    return [
        {"chunk": chunk, "remat": remat, "peak": peak, "flops": 1.0, "seconds": 1.0,
         "fits": peak < 10}
        for chunk, remat, peak in settings
    ]  # fmt: skip


def test_the_smallest_is_compiled_before_nothing_fits(monkeypatch):
    """Estimates may be too low for all that is tried first."""
    found = candidates(*((2**n, "full", 9.0) for n in range(9, 3, -1)), (8, "dots", 2.0))
    found = [{**one, "remat": f"{one['remat']}{n}"} for n, one in enumerate(found)]
    peaks = {(one["chunk"], one["remat"]): 11.0 for one in found}
    asked, said, text = searched(monkeypatch, peaks, found)
    assert len(asked) == 5 and asked[-1] == (8, "dots6")
    assert "Nothing fits (none of the 5 compiled, the smallest among them)" in text
    assert "Settings by" in said[0] and "Settings by" not in text  # the table is printed once
    asked, _, text = searched(monkeypatch, {(8, "full"): 12.0}, candidates((8, "full", 30.0)))
    assert asked == [(8, "full")] and "none of the 1 compiled" in text
    asked, _, text = searched(monkeypatch, {}, candidates((8, "full", 30.0)), base=11.0)
    assert not asked and "the arguments alone are too large: none was compiled" in text
    assert "--compile" not in text


@pytest.mark.parametrize("own, at", [(1.02, 1), (1.05, 3)])
def test_what_is_compiled_first_is_what_is_recommended_without(own, at, monkeypatch):
    """The setting as it is, unless another is faster as counted; every setting is traced once."""
    traced, seconds = [], {(4, "dots"): 1.03, (8, "full"): own}
    made = object.__new__(planner._Planner)
    made.setting, made.mesh, made._counted = (8, "full"), None, {}
    made._run = lambda setting, mesh: types.SimpleNamespace(step=setting, arguments=())
    made._estimated = lambda setting: {"seconds": seconds[setting]}
    monkeypatch.setattr(flops, "count", lambda step: traced.append(step) or flops.Flops({}, {}))
    found = candidates((4, "none", 12.0), (4, "dots", 9.0), (6, "full", 9.0), (8, "full", 9.0))
    turn = made._in_turn(found)
    assert [one for one in turn if one is not found[3]] == found[:3] and turn[at] is found[3]
    assert made._best(found) is turn[1] and sorted(traced) == [(4, "dots"), (8, "full")]
    del found[3]
    assert made._in_turn(found) == found and made._in_turn(found[:1]) == found[:1]


def test_compiling_a_setting(monkeypatch):
    """A small program, on devices of the CPU: its bytes, and what crosses hosts is slower."""
    monkeypatch.setattr(topology, "compile_devices", lambda hardware: jax.devices()[:4])
    monkeypatch.setattr(topology, "check_compiler", lambda hardware, kernel: None)
    made = object.__new__(planner._Planner)
    made.settings = {"model": {"attention": "auto", "dtype": "bfloat16"}}
    made.topology = topology.parse("a100-80g:2x2")
    made.mesh = sharding.abstract_mesh(1, 4, 1)
    made._idle, made.estimator = 64.0, types.SimpleNamespace(limit=1e6)
    made._arguments = memory.Arguments(64 * 64 * 4 / 4, 64.0, 4.0, 16 * 64 * 4 / 4)

    def run(setting, mesh, attention):
        asked.append((setting, attention))

        def shape(*sizes, spec):
            place = jax.sharding.NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=place)

        whole = jax.sharding.NamedSharding(mesh, P())

        @jax.jit
        def step(weights, x, bias):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(weights, whole) + bias)

        found = object.__new__(abstract.Run)
        found.__dict__.update(
            step=step,
            state=shape(64, 64, spec=P(None, "fsdp")),
            frozen=shape(16, 64, spec=sharding.BATCH),
            batch=shape(spec=P()),
        )
        return found

    asked, made._run = [], run
    found = made.compile((8, "dots"), how="whole")["compiled"]
    assert asked == [((8, "dots"), "xla")] and found["attention"] == "xla"
    assert (found["chunk"], found["remat"], found["refusal"]) == (8, "dots", "")
    assert found["fits"] and found["arguments_match"] and found["loops_known"]
    assert found["peak"] >= found["arguments"] + found["idle"]
    (gather,) = found["collectives"]
    assert (gather["kind"], gather["group"], gather["hosts"]) == ("all-gather", 4, 2)
    seconds = 64 * 64 * 4 * 3 / 4 / (2 * 25e9)
    assert found["network_seconds"] == found["collective_seconds"] == pytest.approx(seconds)
    limit = {"bytes": 1e6, "memory": 2e6, "margin_words": "half"}
    hardware = {"device_link": 300e9, "device_network": 25e9}
    text = page.compiled(found, {"limit": limit, "topology": hardware})
    assert "if nothing hid them, at 300 GB/s a device, between hosts 25 GB/s of network" in text
    made.estimator.limit = 64.0
    assert not made.compile((8, "dots"), how="whole")["compiled"]["fits"]


def test_a_ring_between_hosts_is_as_fast_as_their_networks():
    made = object.__new__(planner._Planner)

    def speed(name: str, group: int, hosts: int) -> float:
        made.topology = topology.parse(name)
        return made._speed(collectives.Collective("all-gather", "", group, hosts, 1, 1, 1.0))

    assert speed("a100-80g:2x8", 8, 1) == 300e9  # NVLink
    assert speed("a100-80g:2x8", 16, 2) == 8 * 25e9  # every device's card
    assert speed("a100-80g:2x8", 2, 2) == 25e9
    assert speed("h100:4x8", 32, 4) == 8 * 50e9
    assert topology.parse("v5e:4x4").linked == 16 and topology.parse("h100:4x8").linked == 8


def test_what_compilers_write_is_shown_if_they_fail(capfd):
    with compiled.quiet():
        os.write(2, b"no GPU here")
    with pytest.raises(RuntimeError), compiled.quiet():
        os.write(2, b"out of memory")
        raise RuntimeError("RESOURCE_EXHAUSTED: too large")
    with pytest.raises(ValueError), compiled.quiet():
        os.write(2, b"the reason")
        raise ValueError
    assert capfd.readouterr().err == "the reason"


def test_what_a_compiler_says_of_too_large_a_program():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of "
        "memory in memory space hbm. Used 63.80G of 15.75G hbm. Exceeded hbm capacity by 48.05G."
    )
    found = compiled._refused(message, 3.0)
    assert found.peak == pytest.approx(63.8 * 2**30) and found.refusal.startswith("CompileTimeHbm")
    other = compiled._refused("RESOURCE_EXHAUSTED: temporaries (63.80G) exceeds available HBM", 1.0)
    assert other.peak == pytest.approx(63.8 * 2**30)
