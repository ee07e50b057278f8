"""What instructions of a small program cost, by hand, and what is told of a step."""

import dataclasses
import json
import pathlib
import sys

import pytest

from unime_jax.planning import topology as topologies
from unime_jax.types import UserError

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import hlo  # noqa: E402
import predict  # noqa: E402

# A loop over three layers: a slice of stacked weights, a product, a copy of it, and what is kept.
# Around it attention's way back, two products in f32, random numbers, a sum, padding, a branch and
# a collective.
PROGRAM = """HloModule step, is_scheduled=true

%slice (p.0: bf16[3,8,4], p.1: s32[]) -> bf16[8,4] {
  %p.0 = bf16[3,8,4]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,8,4]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %flat = bf16[8,4]{1,0} bitcast(%one)
}

%keep (p.2: bf16[3,2,4], p.3: bf16[2,4], p.4: s32[]) -> bf16[3,2,4] {
  %p.2 = bf16[3,2,4]{2,1,0} parameter(0)
  %p.3 = bf16[2,4]{1,0} parameter(1)
  %wide = bf16[1,2,4]{2,1,0} bitcast(%p.3)
  %p.4 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %put = bf16[3,2,4]{2,1,0} dynamic-update-slice(%p.2, %wide, %p.4, %zero.1, %zero.1)
}

%body (t: (s32[], bf16[2,8], bf16[3,8,4], bf16[3,2,4])) -> (s32[], bf16[2,8], bf16[3,8,4], bf16[3,2,4]) {
  %t = (s32[], bf16[2,8]{1,0}, bf16[3,8,4]{2,1,0}, bf16[3,2,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[2,8]{1,0} get-tuple-element(%t), index=1
  %w = bf16[3,8,4]{2,1,0} get-tuple-element(%t), index=2
  %kept = bf16[3,2,4]{2,1,0} get-tuple-element(%t), index=3
  %layer = bf16[8,4]{1,0} fusion(%w, %i), kind=kLoop, calls=%slice, metadata={op_name="jit(train_step)/jvp()/while/body/dynamic_slice"}
  %dot = bf16[2,4]{1,0} dot(%x, %layer), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(train_step)/transpose(jvp(decoder))/while/body/closed_call/checkpoint/rematted_computation/dot_general"}
  %copy = bf16[2,4]{0,1} copy(%dot)
  %save = bf16[3,2,4]{2,1,0} fusion(%kept, /*index=1*/%copy, %i), kind=kLoop, calls=%keep
  ROOT %next = (s32[], bf16[2,8]{1,0}, bf16[3,8,4]{2,1,0}, bf16[3,2,4]{2,1,0}) tuple(%i, %x, %w, %save)
}

%done (t.1: (s32[], bf16[2,8], bf16[3,8,4], bf16[3,2,4])) -> pred[] {
  %t.1 = (s32[], bf16[2,8]{1,0}, bf16[3,8,4]{2,1,0}, bf16[3,2,4]{2,1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%noise (p.5: u32[10]) -> u32[10] {
  %p.5 = u32[10]{0} parameter(0)
  %mixed = u32[10]{0} xor(%p.5, %p.5)
  %moved = u32[10]{0} shift-left(%mixed, %p.5)
  %small = pred[10]{0} compare(%moved, %p.5), direction=LT
  ROOT %sum = u32[10]{0} add(%moved, %mixed)
}

%plus (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%total (p.6: f32[8,10]) -> f32[8] {
  %p.6 = f32[8,10]{1,0} parameter(0)
  %none = f32[] constant(0)
  ROOT %r = f32[8]{0} reduce(%p.6, %none), dimensions={1}, to_apply=%plus, metadata={op_name="jit(step)/reduce_sum"}
}

%padded (p.7: bf16[5,4]) -> bf16[8,4] {
  %p.7 = bf16[5,4]{1,0} parameter(0)
  %nothing = bf16[] constant(0)
  ROOT %pad = bf16[8,4]{1,0} pad(%p.7, %nothing), padding=0_3x0_0
}

%third (p.8: bf16[4,6], p.9: bf16[4,6]) -> bf16[4,2] {
  %p.8 = bf16[4,6]{1,0} parameter(0)
  %p.9 = bf16[4,6]{1,0} parameter(1)
  %both = bf16[4,6]{1,0} add(%p.8, %p.9)
  ROOT %some = bf16[4,2]{1,0} slice(%both), slice={[0:4], [2:4]}
}

%cheap (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %same = f32[8]{0} negate(%q)
}

%dear (q.1: f32[8]) -> f32[8] {
  %q.1 = f32[8]{0} parameter(0)
  %first = f32[8]{0} negate(%q.1)
  ROOT %second = f32[8]{0} exponential(%first)
}

ENTRY %main (x.1: bf16[2,8], w.1: bf16[3,8,4], k: bf16[3,2,4], f: f32[8,10], u: u32[10], h: bf16[1,6,2,4], c.1: s32[], s: bf16[5,4], qkv: bf16[4,6]) -> f32[8] {
  %x.1 = bf16[2,8]{1,0} parameter(0)
  %w.1 = bf16[3,8,4]{2,1,0} parameter(1)
  %k = bf16[3,2,4]{2,1,0} parameter(2)
  %f = f32[8,10]{1,0} parameter(3)
  %u = u32[10]{0} parameter(4)
  %h = bf16[1,6,2,4]{3,2,1,0} parameter(5)
  %c.1 = s32[] parameter(6)
  %s = bf16[5,4]{1,0} parameter(7)
  %qkv = bf16[4,6]{1,0} parameter(8)
  %start = (s32[], bf16[2,8]{1,0}, bf16[3,8,4]{2,1,0}, bf16[3,2,4]{2,1,0}) tuple(%c.1, %x.1, %w.1, %k)
  %loop = (s32[], bf16[2,8]{1,0}, bf16[3,8,4]{2,1,0}, bf16[3,2,4]{2,1,0}) while(%start), condition=%done, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %attend = (bf16[1,6,2,4]{3,2,1,0}, u8[0]{0}) custom-call(%h, %h, %h), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.5, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["1", "2", "6", "6"], "tuple_shapes": []}, "mask_type": "CAUSAL"}}
  %exact = f32[8,8]{1,0} dot(%f, %f), lhs_contracting_dims={1}, rhs_contracting_dims={1}, operand_precision={highest,highest}
  %gemm = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%f, %f), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %random = u32[10]{0} fusion(%u), kind=kLoop, calls=%noise
  %sums = f32[8]{0} fusion(%f), kind=kInput, calls=%total
  %longer = bf16[8,4]{1,0} fusion(%s), kind=kLoop, calls=%padded
  %part = bf16[4,2]{1,0} fusion(%qkv, %qkv), kind=kLoop, calls=%third
  %branch = f32[8]{0} conditional(%c.1, %sums, %sums), branch_computations={%cheap, %dear}
  %sent = (f32[8]{0}, f32[16]{0}) all-gather-start(%branch), dimensions={0}
  ROOT %end = f32[16]{0} all-gather-done(%sent)
}
"""  # noqa: E501
RATES = hlo.Rates(products=100.0, single=20.0, memory=10.0, integers=2.0, link=4.0)
# name: kind, times, operations, bytes, integer operations, seconds; of one time but for `times`.
BY_HAND = {
    # 64 bytes of the stack and the layer's number in, 64 out.
    "layer": (hlo.SLICES, 3, 0, 132, 0, 13.2),
    "dot": (hlo.PRODUCTS, 3, 2 * 2 * 4 * 8, 32 + 64 + 16, 0, 11.2),  # 1.28 s of operations
    "copy": (hlo.COPIES, 3, 0, 32, 0, 3.2),
    "save": (hlo.RESIDUALS, 3, 0, 16 + 4 + 16, 0, 3.6),
    # 2 products of 2 x 6 x 6 pairs and heads of 4, half of them, 2.5 times; 4 arrays of 96 bytes.
    "attend": (hlo.ATTENTION, 1, 2.5 * 0.5 * 2 * 2 * 72 * 4, 384, 0, 38.4),
    "exact": (hlo.PRODUCTS, 1, 2 * 8 * 8 * 10, 320 + 320 + 256, 0, 89.6),
    "gemm": (hlo.PRODUCTS, 1, 2 * 8 * 8 * 10, 320 + 320 + 256 + 64, 0, 96.0),
    "random": (hlo.INTEGERS, 1, 0, 80, 30, 15.0),
    "sums": (hlo.REDUCTIONS, 1, 0, 320 + 32, 0, 35.2),
    "longer": (hlo.PADDING, 1, 0, 40 + 64, 0, 10.4),
    "part": (hlo.ELEMENTWISE, 1, 0, 48 / 3 + 48 / 3 + 16, 0, 4.8),  # a third of what it reads
    "first": (hlo.ELEMENTWISE, 1, 0, 64, 0, 6.4),
    "second": (hlo.ELEMENTWISE, 1, 0, 64, 0, 6.4),
    "sent": (hlo.COLLECTIVES, 1, 0, 64, 0, 16.0),
}


@pytest.fixture(scope="module")
def costs() -> dict[str, hlo.Cost]:
    program = hlo.Program(PROGRAM)
    found = program.costs(RATES)
    assert not program.unknown_loops
    return {cost.name: cost for cost in found}


def test_instructions_cost_what_they_do_by_hand(costs):
    assert list(costs) == list(BY_HAND)
    for name, (kind, times, operations, moved, integers, seconds) in BY_HAND.items():
        cost = costs[name]
        assert (cost.kind, cost.times) == (kind, times), name
        found = cost.operations, cost.bytes, cost.integers, cost.seconds
        each = operations, moved, integers, seconds
        assert found == pytest.approx([times * value for value in each]), name


def test_operations_decide_where_memory_is_fast():
    rates = hlo.Rates(products=100.0, single=20.0, memory=1e9, integers=1e9, link=1e9)
    found = {cost.name: cost.seconds for cost in hlo.Program(PROGRAM).costs(rates)}
    assert found["dot"] == pytest.approx(3 * 1.28)
    assert found["attend"] == pytest.approx(14.4)
    assert found["gemm"] == pytest.approx(1280 / 50)  # TF32: half as fast
    assert found["exact"] == pytest.approx(1280 / 20)  # f32


def test_loops_of_unknown_length_are_counted():
    program = hlo.Program(PROGRAM.replace("known_trip_count", "other"))
    found = {cost.name: cost.times for cost in program.costs(RATES)}
    assert program.unknown_loops == 1 and found["dot"] == 1


def test_a_step_is_the_sum_of_its_pieces(costs):
    once = predict.Predicted("rows", 1, list(costs.values()), 1.0, 1.0, 0.0)
    thrice = predict.Predicted("others", 3, [c.scaled(3) for c in costs.values()], 1.0, 1.0, 0.0)
    summary = predict.summarise([once, thrice], 3)
    total = 4 * sum(times * seconds for _, times, *_, seconds in BY_HAND.values())
    assert summary["seconds"] == pytest.approx(total)
    assert summary["products_seconds"] == pytest.approx(4 * (3 * 11.2 + 89.6 + 96.0))
    assert summary["operations_seconds"] == pytest.approx(4 * (3 * 1.28 + 64 + 25.6))
    assert sum(one["share"] for one in summary["kinds"]) == pytest.approx(1)
    listed = [(one["name"], one["piece"]) for one in summary["instructions"]]
    assert listed == [("layer", "others"), ("attend", "others"), ("sums", "others")]
    text = predict.page({**summary, "pairs": 8})
    assert "elementwise" in text and f"{total:.3f}" in text
    quick = predict.summarise([dataclasses.replace(once, costs=[costs["copy"].scaled(1e-3)])], 0)
    assert "the step           9.600" in predict.page({**quick, "pairs": 8})


def test_names_are_told_without_machinery():
    name = "jit(train_step)/transpose(jvp(decoder))/while/body/closed_call/checkpoint/"
    name += "rematted_computation/decoder/decoder/jit(silu)/mul"
    assert predict.shorten(name) == "back/decoder/again/decoder/jit(silu)/mul"
    assert predict.shorten("jit(train_step)/jvp()/vision/add") == "forth/vision/add"


def test_rates_are_those_of_the_chip():
    found = predict.rates(topologies.CHIPS["h200"], 0.7)
    assert found.products == pytest.approx(0.7 * 989e12)
    assert found.single == pytest.approx(0.7 * 66.9e12, rel=1e-3)  # NVIDIA's data sheet: 67
    assert found.integers == pytest.approx(16.7e12, rel=2e-3)
    assert found.memory == pytest.approx(0.85 * 4.8e12)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--topology is missing"),
        (["--topology=v5e:4x4"], "GPUs alone"),
        (["--topology=h200:1", "--mfu=2"], "--mfu=2.0"),
        (["--topology=h200:1", "--top=-1"], "--top=-1"),
    ],
)
def test_what_cannot_be_predicted_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        predict.main(["predict.py", "--config=configs/llava16_stage2.py", *flags])


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(topologies, "_installed", lambda module: False)
    with pytest.raises(UserError, match=r"H200.*pip install -e '.\[plan-gpu\]'"):
        predict.check_compiler(topologies.parse("h200:1"), True)


@pytest.mark.slow  # it traces all pieces of a step
def test_pieces_of_a_step_are_predicted(monkeypatch, capsys):
    """All but the compiler, which gives the program above for every piece."""
    import jax

    monkeypatch.setattr(topologies, "use_no_accelerator", lambda: None)
    monkeypatch.setattr(topologies, "check_compiler", lambda *_, **__: None)
    monkeypatch.setattr(topologies, "compile_devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(predict.Steps, "_compile", lambda *_: PROGRAM)
    predict.main(
        ["predict.py", "--config=configs/llava16_stage1.py:smoke", "--topology=h200:1", "--json"]
    )
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert "WARNING: its products have" in told.err  # they are others than the plan's
    assert found["pairs"] == 24 and found["seconds"] > 0
    for one in found["pieces"]:
        assert one["planned"] > 0 and one["found"] == 3 * 128 + 2 * 1280
