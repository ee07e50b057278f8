"""Steps that are compiled piece by piece take what whole ones take."""

import dataclasses
import errno
import os
import pathlib
import signal

import jax
import llava_step
import pytest

from unime_jax import config as config_lib
from unime_jax import sharding
from unime_jax.planning import (
    abstract,
    alike,
    collectives,
    compiled,
    composition,
    pieces,
    topology,
)
from unime_jax.types import Batch, UserError

DEVICES = 4
BATCH = composition.Composition(
    query=((24, 8, 0), (40, 12, 0), (60, 20, 1), (16, 24, 1)),
    target=((25, 8, 0), (99, 16, 1), (17, 28, 1)),
    negative=(),
    rows=140,
    steps=3,
    sets=("one",),
    real_tokens=0.0,
)


def test_a_step_is_divided_by_the_shape_of_its_groups():
    found = pieces.divide(BATCH, 16, DEVICES)
    assert len(found) == 7 and found[-1].group is None
    # Groups of one shape are one, each padded to the devices before. Chunks of shorter groups have
    # more rows, in proportion to the longest.
    assert [(*piece.group, piece.chunk) for piece in found[:-1]] == [
        (24 + 28, 8, 0, 56), (40, 12, 0, 37), (60, 20, 1, 22), (16, 24, 1, 18),
        (100, 16, 1, 28), (20, 28, 1, 16),
    ]  # fmt: skip
    assert [piece.group for piece in pieces.divide(BATCH, 0)][:2] == [(49, 8, 0), (40, 12, 0)]


def test_pieces_of_a_kind_are_those_of_one_program():
    """Images chunk by chunk and at once, texts at once and chunk by chunk, and the loss."""
    found = alike.kinds(pieces.divide(BATCH, 16, DEVICES), DEVICES)
    named = [[piece.group and piece.group[:2] for piece in kind] for kind in found]
    # A device has 7 rows of 16 at a time, 5 of 20, 3 of 28; 13 of 8; 4 of 24; 5 of 12.
    images = [(100, 16), (60, 20), (20, 28)]
    assert named == [images, [(52, 8)], [(16, 24)], [(40, 12)], [None]]


def gather(shape, loop, calls, size):
    return collectives.Collective("all-gather", shape, DEVICES, 1, loop, calls, size)


def test_what_follows_from_a_piece():
    first, other = pieces.Piece((64, 20, 1), 16), pieces.Piece((32, 16, 1), 16)
    moved = [
        gather("u4[64,64]", 4, 4 * 2 * 3, 24e3),  # weights, in each of four chunks
        gather("f32[4,16,8]", 1, 1, 2048.0),  # embeddings: 16 rows a device
        gather("f32[64,33]", 1, 2, 5e3),  # weights outside of loops
    ]
    program = compiled.Compiled(9.0, 100.0, 50.0, 160.0, moved)
    found = pieces.Found(first, "xla", program, 100.0, kept=32.0)
    made = alike.follow(found, other, DEVICES)
    assert made.piece == other and made.like == first and made.kept == 16.0
    assert [(one.calls, one.bytes) for one in made.compiled.moved[:2]] == [(12, 12e3), (1, 1024.0)]
    assert made.compiled.beside == found.compiled.beside == 60.0
    assert made.summary()["like"] == "64 rows of 20 with 1 tile(s)"
    first, other = pieces.Piece((64, 20, 0)), pieces.Piece((32, 10, 0))  # all rows at once
    made = alike.follow(pieces.Found(first, "xla", program, 100.0, kept=32.0), other, DEVICES)
    assert made.held == 8.0 and made.work == 60.0 - 32.0


def test_pieces_add_up():
    """Those that are encoded at once hold theirs together, the others hold little."""
    moved = [gather("f32[8]", 1, 2, 10.0)]

    def made(piece, beside, kept, chunked=False, moved=()):
        program = compiled.Compiled(1.0, 100.0, beside, 100.0 + beside, list(moved))
        return pieces.Found(piece, "xla", program, 100.0, kept, chunked)

    texts = made(pieces.Piece((8, 4, 0)), 30.0, 20.0, moved=moved)
    images = made(pieces.Piece((8, 9, 1), 2), 90.0, 5.0, chunked=True)
    loss = made(pieces.Piece(None), 1.0, 0.0)
    whole = pieces.together([texts, images, loss], arguments=300.0, gradients=7.0, seconds=3.0)
    assert whole.temporaries == (90 - 5) + 5 + 7  # more than 20 + 10
    assert whole.peak == 300 + whole.temporaries and whole.seconds == 3
    many = pieces.together([*[texts] * 5, images], 300.0, 7.0, 3.0)
    assert many.temporaries == 5 * 20 + 10 + 5 + 7 * 5
    assert [(one.calls, one.bytes) for one in many.moved] == [(10, 50.0)]
    program = dataclasses.replace(images.compiled, refusal="too large")
    refused = dataclasses.replace(images, compiled=program)
    assert pieces.together([texts, refused], 300.0, 7.0, 3.0).refusal == "too large"


def test_what_compilers_said_is_kept_and_asked_again_where_it_is_damaged(tmp_path, monkeypatch):
    leaf = jax.ShapeDtypeStruct((8,), "float32")
    run = abstract.Run(jax.jit(lambda state, *_: state), [leaf], {}, Batch((), (), (), ()))

    def ask(cache=tmp_path / "plans"):
        return compiled.compile_step(run, "cpu", cache=cache)

    first = ask()
    (path,) = (tmp_path / "plans").iterdir()
    assert ask() == first  # the seconds as well
    for content in ("", "[]", "null", "{}", '{"seconds": 1}', "{" + path.read_text()):
        path.write_text(content)
        again = ask()
        assert again.arguments == first.arguments and again == ask() != first
    (tmp_path / "file").touch()
    assert ask(tmp_path / "file").arguments == ask(tmp_path / "file" / "plans").arguments
    with monkeypatch.context() as patch:  # a full disk
        patch.setattr(pathlib.Path, "replace", fail)
        path.unlink()
        assert ask().arguments == first.arguments and not list((tmp_path / "plans").iterdir())
    ask()
    monkeypatch.setattr(compiled, "_FORMAT", 0)
    ask()
    assert len(list((tmp_path / "plans").iterdir())) == 2


def test_products_too_small_for_triton_are_compiled_without_it():
    class Lowered:
        def compile(self, options):
            if options.get("xla_gpu_enable_triton_gemm", True):
                raise jax.errors.JaxRuntimeError(self.message)
            return options

    lowered = Lowered()
    lowered.message = "INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.348"
    found = compiled._compile(lowered, "gpu")
    assert found == {**compiled._OPTIONS["gpu"], "xla_gpu_enable_triton_gemm": False}
    lowered.message = "INTERNAL: other"
    with pytest.raises(jax.errors.JaxRuntimeError):
        compiled._compile(lowered, "gpu")
    run = abstract.Run(Lowered(), [], {}, Batch((), (), (), ()))
    run.step.lower, run.step.message = lambda *_: run.step, "INTERNAL: other"
    with pytest.raises(UserError, match=r"the compiler fails \(INTERNAL: other\); plan without"):
        compiled.compile_step(run, "gpu")


def fail(*_):
    raise OSError(errno.ENOSPC, "no space left on device")


def die(piece, job):
    os.write(2, b"Could not find cuda drivers")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_compiler_that_is_killed_is_named(monkeypatch, capfd):
    monkeypatch.setattr(pieces, "compile_piece", die)
    monkeypatch.setattr(pieces, "_free_gib", lambda: 0.1)  # one process
    job = pieces.Job({}, {}, BATCH, topology.parse("h100:1"), (1, 1, 1), 8, flash=False)
    with pytest.raises(UserError, match="a compiler was killed, as by a lack of memory"):
        list(pieces.compile_all([pieces.Piece(None)], job))
    assert "cuda drivers" not in capfd.readouterr().err  # what JAX says as it is imported


def test_compilers_that_end_by_themselves_are_told_from_those_that_are_killed():
    assert "exit code 1" in pieces._ended([1]) and "signal 11" in pieces._ended([-11])
    for codes in ([], [-9], [-9, 1]):  # one that was killed takes the others with it
        assert "lack of memory" in pieces._ended(codes)


@pytest.mark.slow
def test_pieces_send_what_the_whole_step_sends(monkeypatch, tmp_path):
    """On devices of the CPU, whose memory is no measure; quantised weights over fsdp."""
    monkeypatch.setenv("UNIME_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(topology, "compile_devices", lambda hardware: jax.devices()[:DEVICES])
    file = llava_step.__file__.replace("tests/llava_step.py", "configs/llava16_stage2.py")
    settings = config_lib.parse(["plan", f"--config={file}"], "doc").to_dict()
    settings["model"] |= {"dtype": "float32", "remat": "none"}
    settings["train"] |= {"chunk": 16, "quantize": "nf4"}
    text = {**llava_step.CONFIG["text_config"], "hidden_size": 256, "intermediate_size": 512}
    config = {**llava_step.CONFIG, "text_config": text}
    made = dataclasses.replace(
        BATCH, query=((24, 8, 0), (60, 20, 2)), target=((84, 24, 2),), rows=84
    )
    hardware = topology.parse("a100-80g:4")
    job = pieces.Job(settings, config, made, hardware, (1, DEVICES, 1), 256, False)
    kinds = alike.kinds(pieces.divide(made, 16, DEVICES), DEVICES)
    assert sorted(map(len, kinds)) == [1, 1, 2]
    found = []
    for first, *rest in kinds:
        found.append(pieces.compile_piece(first, job))
        found += [alike.follow(found[-1], piece, DEVICES) for piece in rest]
    again = pieces.compile_piece(kinds[-1][0], job)
    assert again.compiled == found[-1].compiled and len(list(tmp_path.glob("plans/*.json"))) == 3
    for one in found:
        assert one.compiled.arguments == one.arguments or one.like is not None
    mesh = sharding.make_mesh(*job.mesh, devices=jax.devices()[:DEVICES])
    run = abstract.run(settings, config, made, mesh=mesh)
    whole = compiled.compile_step(run, "cpu")
    parts = pieces.together(found, whole.arguments, 0.0, 0.0)
    assert total(parts, "all-gather") == pytest.approx(total(whole, "all-gather"), rel=0.02)
    assert sum(one.bytes for one in parts.moved) == pytest.approx(
        sum(one.bytes for one in whole.moved), rel=0.03
    )


def total(program, kind):
    return sum(one.bytes for one in program.moved if one.kind == kind)
