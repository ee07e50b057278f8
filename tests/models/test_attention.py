"""One door for attention: every kernel gives what XLA does, each platform gets its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from unime_jax import runtime, sharding
from unime_jax.models import layers, splash
from unime_jax.models.attention import attention
from unime_jax.planning import flops
from unime_jax.types import UserError

LENGTHS = (100, 60)


def arrays(tokens, *, rows=2, heads=2, shared=1, width=16):
    rng = np.random.default_rng(0)
    shapes = [(rows, tokens, n, width) for n in (heads, shared, shared)]
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def attend(implementation, placement=None, *, causal, lengths=None):
    def run(q, k, v):
        real = None if lengths is None else jnp.array(lengths, jnp.int32)
        with layers.placed(placement):
            return attention(q, k, v, causal=causal, lengths=real, implementation=implementation)

    return jax.jit(run)


@pytest.mark.parametrize(
    "tokens, options",
    [(130, {"causal": True}), (100, {"causal": False, "lengths": LENGTHS})],
    ids=["causal", "lengths"],
)
def test_splash_equals_xla(tokens, options):
    """Interpreted. Both lengths are padded inside the door; heads share keys."""
    args = arrays(tokens)
    found, expected = (attend(name, **options)(*args) for name in ("splash_interpret", "xla"))
    tolerances.assert_near(found, expected, tolerances.MODULE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokens, options",
    [
        (130, {"causal": True}),
        (100, {"causal": False, "lengths": LENGTHS}),
        (577, {"causal": False}),  # CLIP's patches
        (700, {"causal": True}),  # two blocks
    ],
    ids=["causal", "lengths", "clip", "blocks"],
)
def test_splash_has_the_gradients_of_xla(tokens, options):
    args = arrays(tokens)
    seen = np.ones((2, tokens, 1, 1), np.float32)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(args[0].shape, np.float32) * seen)

    def gradients(name):
        run = attend(name, **options)
        return jax.jit(jax.grad(lambda *x: (run(*x) * weight).sum(), (0, 1, 2)))(*args)

    pairs = zip(gradients("splash_interpret"), gradients("xla"), strict=True)
    for name, (found, expected) in zip("qkv", pairs, strict=True):
        assert tolerances.relative(found, expected) < tolerances.GRADIENT, name


@pytest.mark.slow
def test_every_device_runs_splash_on_its_rows_and_heads():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placement = layers.Placement(kernel=lambda run: sharding.per_device(run, mesh))
    args = arrays(100, rows=4, heads=4, shared=2)
    placed = [
        jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data",))))
        for x in args
    ]
    run = attend("splash_interpret", placement, causal=True)
    text = run.lower(*placed).as_text()
    assert "tensor<1x2x128x16xf32>" in text, "a device has one row and two heads of the four"
    tolerances.assert_near(run(*placed), attend("xla", causal=True)(*args), tolerances.MODULE)
    # What does not divide stays whole.
    odd = arrays(100, rows=3, heads=3, shared=3)
    found = attend("splash_interpret", placement, causal=True)(*odd)
    tolerances.assert_near(found, attend("xla", causal=True)(*odd), tolerances.MODULE)


@pytest.mark.parametrize(
    "tokens, found",
    [(1, (128, 128)), (128, (128, 128)), (577, (640, 640)), (641, (384, 768)), (2928, (512, 3072))],
)
def test_blocks(tokens, found):
    assert splash.block_of(tokens) == found


def lowered(
    platform,
    implementation,
    placement=None,
    dtype=jnp.bfloat16,
    *,
    width=64,
    causal=True,
    tokens=577,
    lengths=None,
    heads=(4, 2, 2),
):
    shapes = [(2, tokens, n, width) for n in heads]
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    run = attend(implementation, placement, causal=causal, lengths=lengths)
    return run.trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_splash_lowers_for_tpu_without_one():
    """As `plan` does; CLIP's rows of 577 are padded to one block of 640."""
    text = lowered("tpu", "splash", causal=False)
    assert text.count("tpu_custom_call") == 1 and "2x4x640x64xbf16" in text
    assert "577x577" not in text


@pytest.fixture
def cudnn(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *_: True)


def test_every_device_runs_cudnn_on_its_heads(cudnn):
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=2, devices=jax.devices()[:2])
    placement = layers.Placement(kernel=lambda run: sharding.per_device(run, mesh))
    calls = [
        line
        for heads in ((4, 2, 2), (4, 1, 1))  # one head of keys does not divide
        for line in lowered("cuda", "cudnn", placement, heads=heads).splitlines()
        if "__cudnn" in line
    ]
    assert len(calls) == 2
    assert "tensor<2x577x2x64xbf16>, tensor<2x577x1x64xbf16>" in calls[0]
    assert "tensor<2x577x4x64xbf16>, tensor<2x577x1x64xbf16>" in calls[1]


def test_operations_are_those_of_the_reference():
    args, counts = arrays(400), []
    for name in ("xla", "splash_interpret"):
        run = attend(name, causal=True)
        counts.append(flops.count(run, *args).model)
        jaxpr = str(run.trace(*args).jaxpr)
        assert ("100,400]" in jaxpr) == (name == "xla"), "what runs is not what was counted"
    assert counts[0] == counts[1] == 2 * 2 * 2 * 400 * 400 * 2 * 16, "scores and their sum"


def test_cudnn_lowers_for_gpu_without_one(cudnn):
    text = lowered("cuda", "cudnn", lengths=(577, 100))
    assert "cudnn$fmha" in text.lower() or "__cudnn" in text.lower()
    assert "577x577" not in text and "PADDING" not in text, "causal rows need no mask"
    assert "PADDING" in lowered("cuda", "cudnn", lengths=(577, 100), causal=False)
    assert "cudnn" not in lowered("cuda", "cudnn", width=256).lower(), "heads too wide for it"


class Device:
    def __init__(self, platform, capability):
        self.platform = self.device_kind = platform
        self.compute_capability = capability


def mesh_of(platform, capability="8.0"):
    return type("Mesh", (), {"devices": np.array([Device(platform, capability)], object)})


@pytest.mark.parametrize(
    "asked, platform, dtype, found",
    [
        ("auto", "tpu", "bfloat16", "splash"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "cuda", "bfloat16", "cudnn"),
        ("auto", "cpu", "bfloat16", "xla"),
        ("auto", "tpu", "float32", "xla"),
        ("auto", "gpu", "float32", "xla"),
        ("xla", "tpu", "bfloat16", "xla"),
        ("splash", "cpu", "float32", "splash_interpret"),
        ("cudnn", "cpu", "bfloat16", None),
        ("cudnn", "gpu", "float32", None),
        ("splash", "gpu", "bfloat16", None),
    ],
)
def test_the_platform_of_the_mesh_decides(asked, platform, dtype, found):
    if found is None:
        with pytest.raises(UserError, match=f"config.model.attention={asked}"):
            runtime.resolve_attention(asked, dtype, mesh_of(platform))
    else:
        assert runtime.resolve_attention(asked, dtype, mesh_of(platform)) == found


@pytest.mark.parametrize(
    "capability, found",
    [("7.5", "xla"), ("gfx90a", "xla"), ("8.6", "cudnn"), ("9.0", "cudnn"), ("12.0", "cudnn")],
)
def test_old_and_other_gpus_take_no_kernel_they_lack(capability, found):
    assert runtime.resolve_attention("auto", "bfloat16", mesh_of("gpu", capability)) == found
    if found == "xla":
        with pytest.raises(UserError, match="config.model.attention=cudnn: .*Ampere"):
            runtime.resolve_attention("cudnn", "bfloat16", mesh_of("gpu", capability))
