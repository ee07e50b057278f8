"""PEFT's adapters against peft itself: read, merged, joined, written; and what is refused."""

import json
import pathlib

import numpy as np
import peft as reference_peft
import pytest
import safetensors.numpy
import tiny_llava
import tolerances
import torch

from unime_jax import models
from unime_jax.models import hf, hf_read, peft
from unime_jax.models.peft import Adapter, LowRank
from unime_jax.types import UserError

# VLM2Vec's way: suffixes, which hit the vision tower and the projector as well.
TARGETS = ["q_proj", "v_proj", "out_proj", "o_proj", "fc1", "down_proj", "linear_2"]
KINDS = {
    "lora": {},
    "rslora": {
        "use_rslora": True,
        "rank_pattern": {"self_attn.q_proj": 5, r"layers.1.mlp.down_proj": 2},
        "alpha_pattern": {r"language_model.*v_proj": 7},
    },
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["multi_modal_projector.linear_1"]},
}
KEY_MAP = models.rules(tiny_llava.CONFIG)
Q = "language_model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llava.write(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def source(base):
    return hf_read.Reader(base, KEY_MAP)


class Case:
    """An adapter of random numbers that peft has written, and what peft makes of it."""

    def __init__(self, base, directory, **options):
        torch.manual_seed(1)
        config = reference_peft.LoraConfig(
            **{"r": 3, "lora_alpha": 8, "target_modules": TARGETS, **options}
        )
        model = reference_peft.get_peft_model(tiny_llava.read(base), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
                elif "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.rand(parameter.shape))
        model.save_pretrained(directory)
        self.directory = directory
        self.embeddings = tiny_llava.embed(model)
        self.merged = model.merge_and_unload()
        self.weights = {
            hf.renamed(name, KEY_MAP): value.numpy()
            for name, value in self.merged.state_dict().items()
        }


@pytest.fixture(scope="module", params=KINDS)
def case(request, base, tmp_path_factory):
    return Case(base, tmp_path_factory.mktemp(request.param), **KINDS[request.param])


def changed(source, adapter, key_map=KEY_MAP):
    """All tensors with the adapter merged in."""
    adapted = peft.Adapted(source, adapter, key_map)
    return {key: adapted.slice(key)[...] for key in adapted.keys()}


def test_merged_weights_are_pefts(source, case):
    actual = changed(source, peft.read(case.directory, KEY_MAP))
    assert set(actual) == set(case.weights)
    for key, value in case.weights.items():
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=1e-5, err_msg=key)
    before = {key: source.slice(key)[...] for key in source.keys()}
    moved = {key for key in before if not np.array_equal(before[key], actual[key])}
    assert sum("vision_tower" in key for key in moved) == 3 * 4
    assert len(moved) == 3 * 4 + 2 * 4 + (3 if "saved" in str(case.directory) else 1)


def test_embeddings_are_pefts(base, case):
    adapter = peft.read(case.directory, KEY_MAP)
    reader = hf_read.Reader(base, KEY_MAP)
    fill = lambda params, keys, finish: hf.fill(  # noqa: E731
        peft.Adapted(reader, adapter, KEY_MAP), keys, params, finish=finish
    )
    model = models.load(base, fill=fill)
    tolerances.assert_near(tiny_llava.ours(model, case.merged), case.embeddings, 1e-5)
    assert np.abs(tiny_llava.ours(models.load(base), case.merged) - case.embeddings).max() > 1e-2


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return Case(base, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def copy(lora, tmp_path):
    """A copy of the plain adapter to be spoilt."""
    for path in lora.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def rewrite(directory, change):
    path = directory / "adapter_model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def reconfigure(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same(first: Adapter, second: Adapter):
    assert set(first.low_rank) == set(second.low_rank)
    assert set(first.replaced) == set(second.replaced)
    for key, change in first.low_rank.items():
        other = second.low_rank[key]
        np.testing.assert_array_equal(change.a, other.a)
        np.testing.assert_array_equal(change.b, other.b)
        assert change.scale == pytest.approx(other.scale, rel=1e-12)
        if change.magnitude is not None:
            np.testing.assert_array_equal(change.magnitude, other.magnitude)
    for key, value in first.replaced.items():
        np.testing.assert_array_equal(value, second.replaced[key])


def test_names_of_other_versions_of_transformers(lora, copy):
    """4.x before 4.52, and adapters saved with the name of the adapter in their keys."""
    old = {
        "model.model.language_model.": "model.language_model.model.",
        "model.model.vision_tower.": "model.vision_tower.vision_model.",
        "model.model.multi": "model.multi",
        "lora_A.": "lora_A.default.",
    }

    def rename(name):
        for new, before in old.items():
            name = name.replace(new, before)
        return name

    rewrite(copy, lambda tensors: {rename(name): x for name, x in tensors.items()})
    with safetensors.safe_open(copy / "adapter_model.safetensors", "numpy") as file:
        assert f"base_model.model.{Q}.lora_A.default.weight" in file.keys()
    same(peft.read(copy, KEY_MAP), peft.read(lora.directory, KEY_MAP))


def test_adapters_of_the_language_model_alone(lora, copy):
    def inner(name):
        return name.replace("model.model.language_model.", "model.model.")

    rewrite(copy, lambda tensors: {inner(n): x for n, x in tensors.items() if "vision" not in n})
    found, whole = peft.read(copy, KEY_MAP), peft.read(lora.directory, KEY_MAP)
    assert set(found.low_rank) == {key for key in whole.low_rank if "vision" not in key}
    assert f"{Q}.weight" in found.low_rank


def test_phi_with_adapters_everywhere(tmp_path):
    """VLM2Vec's targets: fused projections, the tower with its unused last layer, the projector."""
    golden = pathlib.Path(__file__).parents[1] / "golden" / "phi3v_tiny"
    config = models.read_config(golden)
    key_map = models.rules(config)
    source = hf_read.Reader(golden, key_map)
    vision = "model.vision_embed_tokens."
    modules = (
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.0.mlp.gate_up_proj",
        f"{vision}img_processor.vision_model.encoder.layers.2.self_attn.q_proj",
        f"{vision}img_processor.vision_model.encoder.layers.0.mlp.fc1",
        f"{vision}img_projection.0",
    )
    rng, content, expected = np.random.default_rng(0), {}, {}
    for module in modules:
        weight = source.slice(f"{module}.weight")[...]
        a = rng.standard_normal((2, weight.shape[1])).astype(np.float32)
        b = rng.standard_normal((weight.shape[0], 2)).astype(np.float32)
        content[f"base_model.model.{module}.lora_A.weight"] = a
        content[f"base_model.model.{module}.lora_B.weight"] = b
        expected[f"{module}.weight"] = weight + 4 * b @ a
    safetensors.numpy.save_file(content, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": "x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    actual = changed(source, peft.read(tmp_path, key_map), key_map)
    for key, value in actual.items():
        wanted = expected.get(key, source.slice(key)[...])
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5, err_msg=key)


def test_both_spellings_of_doras_magnitude(base, tmp_path):
    dora = Case(base, tmp_path, use_dora=True)
    now = peft.read(dora.directory, KEY_MAP)
    names = set(safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors"))
    ending = ".lora_magnitude_vector"
    assert any(name.endswith(ending) for name in names)
    rewrite(tmp_path, lambda x: {n + ".weight" * n.endswith(ending): v for n, v in x.items()})
    same(peft.read(tmp_path, KEY_MAP), now)
    rewrite(tmp_path, lambda x: {n: v[1:] if "magnitude" in n else v for n, v in x.items()})
    with pytest.raises(UserError, match="has 31 magnitudes for 32 outputs"):
        peft.read(tmp_path, KEY_MAP)


@pytest.mark.parametrize("dora", [False, True])
def test_parts_of_a_merged_weight_are_those_of_the_whole(dora):
    rng = np.random.default_rng(0)
    weight, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((6, 8), (2, 8), (6, 2)))
    magnitude = rng.standard_normal(6).astype(np.float32) if dora else None
    merged = peft.merge(peft.Held(weight, "BF16"), LowRank(a, b, 0.5, magnitude))
    whole = weight + 0.5 * b @ a
    if dora:
        whole *= (magnitude / np.linalg.norm(whole, axis=1))[:, None]
    assert tuple(merged.get_shape()) == (6, 8) and merged.get_dtype() == "BF16"
    tolerances.assert_near(merged[...], whole, 1e-6)
    tolerances.assert_near(merged[2:5, 0:4], whole[2:5, 0:4], 1e-6)


def random_adapter(seed, *, name="run", modules=(Q,), replaced=()):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 32)), rng.standard_normal((32, 2))
    change = LowRank(a.astype(np.float32), b.astype(np.float32), 0.5 + seed)
    low_rank = {f"{module}.weight": change for module in modules}
    whole = {key: rng.standard_normal((32, 32)).astype(np.float32) for key in replaced}
    return Adapter(name, low_rank, whole)


def test_joined_adapters_do_what_they_do_one_after_the_other(source):
    linear = "multi_modal_projector.linear_2"
    other = Q.replace("q_proj", "o_proj")
    first = random_adapter(0, modules=(Q, linear), replaced=[f"{other}.weight"])
    second = random_adapter(1, modules=(Q, other), replaced=[f"{linear}.weight"])
    both = peft.join(first, second)
    assert not set(both.low_rank) & set(both.replaced)
    joined = changed(source, both)
    then = peft.Adapted(peft.Adapted(source, first, KEY_MAP), second, KEY_MAP)
    for key, value in joined.items():
        np.testing.assert_allclose(then.slice(key)[...], value, rtol=0, atol=1e-5, err_msg=key)
    assert both.low_rank[f"{Q}.weight"].a.shape == (4, 32)


def test_dora_is_not_joined():
    plain = random_adapter(0)
    a = plain.low_rank[f"{Q}.weight"]
    dora = Adapter("dora", {f"{Q}.weight": LowRank(a.a, a.b, 1.0, np.ones(32, np.float32))}, {})
    with pytest.raises(UserError, match="DoRA adapter is among those"):
        peft.join(dora, plain)


def test_written_adapters_read_as_they_were(source, case, tmp_path):
    adapter = peft.read(case.directory, KEY_MAP)
    peft.write(tmp_path, adapter, source, base_name="org/base", key_map=KEY_MAP)
    same(peft.read(tmp_path, KEY_MAP), adapter)
    assert peft.base_of(tmp_path) == "org/base"


def test_written_adapters_load_in_peft(base, source, case, tmp_path):
    adapter = peft.read(case.directory, KEY_MAP)
    peft.write(tmp_path, adapter, source, base_name=str(base), key_map=KEY_MAP)
    model = reference_peft.PeftModel.from_pretrained(tiny_llava.read(base), tmp_path).eval()
    tolerances.assert_near(tiny_llava.embed(model), case.embeddings, 1e-5)


def test_modules_are_saved_whole(source, tmp_path):
    linear = "multi_modal_projector.linear_2"
    adapter = random_adapter(0, replaced=[f"{linear}.weight"])
    peft.write(tmp_path, adapter, source, base_name="x", key_map=KEY_MAP)
    found = peft.read(tmp_path, KEY_MAP).replaced
    assert set(found) == {f"{linear}.weight", f"{linear}.bias"}
    np.testing.assert_array_equal(found[f"{linear}.bias"], source.slice(f"{linear}.bias")[...])


@pytest.mark.parametrize(
    ("keys", "words"),
    [(["image_newline"], "belong to no module"), ([f"{Q}.weight"], "have an adapter and were")],
)
def test_what_pefts_format_cannot_hold(source, tmp_path, keys, words):
    adapter = random_adapter(0, replaced=keys)
    with pytest.raises(UserError, match=words):
        peft.write(tmp_path, adapter, source, base_name="x", key_map=KEY_MAP)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"lora_bias": True, "bias": "all"}, "lora_bias = True, bias = 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_new_trick": {"x": 1}}, "use_new_trick"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', which changes the base"),
        ({"r": None}, "r = None"),
        ({"rank_pattern": [8]}, "rank_pattern = [8]"),
        ({"alpha_pattern": {"q_proj": "16"}}, "alpha_pattern = {'q_proj': '16'}"),
    ],
)
def test_settings_that_are_not_built_are_named(copy, changes, words):
    reconfigure(copy, **changes)
    with pytest.raises(UserError, match="adapter_config.json: not supported") as caught:
        peft.read(copy, KEY_MAP)
    assert words in str(caught.value)


def test_all_problems_of_the_weights_are_told_at_once(copy):
    prefix = "base_model.model.model.language_model.layers.0."

    def spoil(tensors):
        del tensors[f"{prefix}self_attn.q_proj.lora_B.weight"]
        tensors[f"{prefix}mlp.down_proj.lora_A.weight"] = np.zeros((9, 56), np.float32)
        tensors[f"{prefix}self_attn.v_proj.lora_B.bias"] = np.zeros(16, np.float32)
        tensors["elsewhere.weight"] = np.zeros(2, np.float32)
        tensors[f"{prefix}mlp.up_proj.base_layer.weight"] = np.zeros((56, 32), np.float32)
        return tensors

    rewrite(copy, spoil)
    reconfigure(copy, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"6 problem\(s\)") as caught:
        peft.read(copy, KEY_MAP)
    for words in ("q_proj has lora_A instead", "(9, 56)", "v_proj.lora_B.bias is not", "elsewhere",
                  "base_layer.weight is not",
                  "names lm_head"):  # fmt: skip
        assert words in str(caught.value)


def test_an_adapter_of_another_base_is_refused(source):
    adapter = random_adapter(0, modules=(Q, "model.layers.7.self_attn.qkv_proj"))
    narrow = LowRank(np.zeros((2, 8), np.float32), np.zeros((32, 2), np.float32), 1.0)
    adapter.low_rank[f"{Q}.weight"] = narrow
    with pytest.raises(
        UserError, match="run is no adapter of .*1 missing: .*1 unfit: .*"
    ) as caught:
        peft.Adapted(source, adapter, KEY_MAP)
    assert "is (32, 32) instead of (32, 8)" in str(caught.value)


def test_missing_and_damaged_files(copy):
    weights = copy / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(UserError, match="adapter_model.safetensors is corrupt or cut short"):
        peft.read(copy, KEY_MAP)
    safetensors.numpy.save_file({}, weights)
    with pytest.raises(UserError, match="adapter_model.safetensors holds no tensors"):
        peft.read(copy, KEY_MAP)
    weights.rename(copy / "adapter_model.bin")
    with pytest.raises(UserError, match="missing; adapter_model.bin may run code"):
        peft.read(copy, KEY_MAP)
    reconfigure(copy, base_model_name_or_path=None)
    with pytest.raises(UserError, match="names no base_model_name_or_path"):
        peft.base_of(copy)
