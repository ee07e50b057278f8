"""LLaVA-1.6 against transformers, on tiny random configs, with gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pictures
import pytest
import safetensors.numpy
import tolerances
import torch
import transformers
from flax import nnx
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from unime_jax import models
from unime_jax.models import hf, lora
from unime_jax.models.clip import MEAN, STD
from unime_jax.models.llava16 import Llava16Config
from unime_jax.types import ImageSpec, UserError, flatten, unflatten

SIZE = 28
IMAGE_TOKEN = 90
GRIDS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 7,
}
TEXT = {**parity.TEXT, "num_hidden_layers": 2, "tie_word_embeddings": False}
TEXTS = {
    "mistral": {**TEXT, "model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "llama": TEXT,
}
# (height, width): fitting, wide, high, one pixel, very wide, odd padding on either side
SHAPES = [(28, 28), (30, 61), (60, 28), (1, 1), (20, 150), (57, 43), (43, 57), (90, 33)]
LONGEST = 5


def config_of(kind: str) -> dict:
    return {
        "model_type": "llava_next",
        "text_config": TEXTS[kind],
        "vision_config": VISION,
        "image_grid_pinpoints": GRIDS,
        "image_token_index": IMAGE_TOKEN,
    }


def make_rows(reference):
    """Rows of text around an image of every shape, one of text alone, and what PyTorch takes."""
    rng = np.random.default_rng(0)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=GRIDS,
        do_rescale=False,
        do_normalize=False,
    )
    features = (SIZE // 7) ** 2
    rows, images = [], []
    for shape in SHAPES:
        image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
        out = processor(image, return_tensors="np", input_data_format="channels_last")
        tiles = out["pixel_values"][0].transpose(0, 2, 3, 1)
        # The reference itself lays out the numbers of the features: newline 0, then the tiles'.
        numbers = 1 + torch.arange(len(tiles) * features).reshape(len(tiles), features, 1)
        sizes = torch.tensor([shape])
        laid_out, _ = reference.model.pack_image_features(
            [numbers.float()], sizes, "default", torch.zeros(1)
        )
        index = laid_out[0][:, 0].numpy().astype(np.int32)
        before, after = rng.integers(1, IMAGE_TOKEN, 2), rng.integers(1, IMAGE_TOKEN, 3)
        ids = np.concatenate([before, np.zeros_like(index), after])
        places = np.concatenate([[-1] * 2, index, [-1] * 3])
        rows.append((ids, places, tiles, (1, 1)))
        images.append((torch.tensor(tiles), sizes))
    ids = rng.integers(1, IMAGE_TOKEN, 9)
    rows.append((ids, np.full(9, -1), None, None))
    images.append((None, None))
    return rows, images


def run(reference, row, image):
    """Hidden states after the final norm, [T, D]."""
    ids = torch.tensor(np.where(row[1] >= 0, IMAGE_TOKEN, row[0]))[None].long()
    tiles, sizes = image
    pixels = None
    if tiles is not None:
        pixels = (tiles.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        pixels = pixels.permute(0, 3, 1, 2)[None]
    out = reference.model(input_ids=ids, pixel_values=pixels, image_sizes=sizes)
    return out.last_hidden_state[0]


class Case:
    """A reference model, its directory, and rows with what it makes of them."""

    def __init__(self, kind: str, directory):
        config = config_of(kind)
        torch.manual_seed(0)
        self.reference = transformers.LlavaNextForConditionalGeneration(
            transformers.LlavaNextConfig(**{k: v for k, v in config.items() if k != "model_type"})
        ).eval()
        parity.randomise(self.reference)
        self.reference.save_pretrained(directory)
        self.kind, self.directory = kind, directory
        self.rows, images = make_rows(self.reference)
        self.direction = np.random.default_rng(1).standard_normal(32).astype(np.float32)
        pairs = zip(self.rows, images, strict=True)
        hidden = [run(self.reference, row, image) for row, image in pairs]
        last = torch.nn.functional.normalize(torch.stack([x[-1] for x in hidden]), dim=-1)
        (last @ torch.tensor(self.direction)).mean().backward()
        self.hidden = [x.detach().numpy() for x in hidden]
        self.embeddings = last.detach().numpy()
        self.groups = [
            pictures.pack(self.rows[:-1], size=SIZE, tiles=LONGEST),
            pictures.pack(self.rows[-1:], size=SIZE),
        ]


@pytest.fixture(scope="module", params=TEXTS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(case):
    return models.load(case.directory)


@pytest.fixture(scope="module")
def results(case, model):
    """Per group (hidden states, embeddings), and gradients where wanted: one program."""
    graphdef, params = parity.split(model)

    def loss(params, groups):  # given: XLA would fold pictures that it knows
        model = nnx.merge(graphdef, params)
        out = [(model.hidden(inputs), model.embed(inputs)) for inputs in groups]
        return (jnp.concatenate([x for _, x in out]) @ case.direction).mean(), out

    if case.kind != "mistral":  # decoders have gradient tests of their own
        return jax.jit(loss)(params, case.groups)[1], None
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, case.groups)
    return out, gradients


def test_hidden_states_and_embeddings_match(case, results):
    hidden = [row for group, _ in results[0] for row in group]
    for row, (ours, expected) in enumerate(zip(hidden, case.hidden, strict=True)):
        np.testing.assert_allclose(
            ours[: len(expected)], expected, rtol=0, atol=tolerances.HIDDEN, err_msg=f"row {row}"
        )
    ours = np.concatenate([group for _, group in results[0]])
    tolerances.assert_near(ours, case.embeddings, tolerances.EMBEDDING)


def test_all_gradients_match(case, results):
    gradients = results[1]
    if gradients is None:
        pytest.skip("computed with Mistral only")
    key_map = models.rules(hf.read_config(case.directory))
    expected = {
        hf.renamed(name, key_map): p.grad.numpy()
        for name, p in case.reference.named_parameters()
        if p.grad is not None
    }
    actual = dict(hf.exported(gradients, key_map, np.float32))
    unused = set(actual) - set(expected)  # the tower's last layer, its last norm, the head
    assert all(not actual.pop(name).any() for name in unused) and len(unused) == 16 + 2 + 1
    # Softmax does not see a constant added to all scores: these are noise around zero.
    for name in [name for name in expected if name.endswith("k_proj.bias")]:
        assert max(np.abs(x.pop(name)).max() for x in (actual, expected)) < 1e-8
    tolerances.assert_gradients_near(actual, expected)


def test_padding_and_batch_mates_change_nothing(case, model):
    if case.kind != "mistral":
        pytest.skip("the same code as with Mistral")
    together = parity.embed(model, case.groups[0])
    noise = np.random.default_rng(3)
    alone = pictures.pack([case.rows[4]], size=SIZE)
    tolerances.assert_near(parity.embed(model, alone)[0], together[4], tolerances.EMBEDDING)
    padded = case.groups[0]
    tiles = np.array(padded.tiles)
    for number, row in enumerate(case.rows[:-1]):
        tiles[number, len(row[2]) :] = noise.integers(0, 256, tiles[number, len(row[2]) :].shape)
    noisy = pictures.pack(case.rows[:-1], size=SIZE, tiles=LONGEST)
    np.copyto(noisy.tiles, tiles)
    np.testing.assert_array_equal(parity.embed(model, noisy), together)


def test_adapters_reach_tower_projector_and_decoder(case, model):
    """Attached they change nothing; each gets a gradient; dropout follows the key."""
    if case.kind != "mistral":
        pytest.skip("the same code as with Mistral")
    options = {"rank": 2, "alpha": 4, "dropout": 0.5, "rngs": nnx.Rngs(0)}
    targets = r"(q_proj|fc2|linear_1)$"
    adapted = lora.attach(models.load(case.directory), targets=targets, **options)
    graphdef, params = parity.split(adapted)
    paths = lora.adapter_paths(params)
    assert len(paths) == 2 * (2 + 2 + 1 + 1)  # tower's layers, its unused one, projector, decoder
    inputs = case.groups[0]

    def loss(params, key):
        out = nnx.merge(graphdef, params).embed(inputs, key=key)
        return (out @ case.direction).mean(), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, ours), gradients = run(params, jax.random.key(0))
    tolerances.assert_near(ours, parity.embed(model, inputs), tolerances.EMBEDDING)
    flat, gradients = flatten(params), flatten(gradients)
    for path in paths:
        used = "last_layer" not in path and path.endswith("lora_B")  # B is 0: A has no gradient yet
        assert used == bool(np.abs(gradients[path]).max() > 0), path
        flat[path] = jnp.full_like(flat[path], 0.1)
    values = [run(unflatten(flat), jax.random.key(seed))[0][1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(values[0], values[1])
    assert np.abs(values[0] - values[2]).max() > 1e-3


def tensors(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def hub_names(case) -> dict[str, np.ndarray]:
    key_map = models.rules(hf.read_config(case.directory))
    return {hf.renamed(k, key_map): v for k, v in tensors(case.directory).items()}


@pytest.mark.parametrize("naming", ["hub", "memory"])
def test_every_naming_is_read_and_the_hubs_is_written(case, naming, tmp_path):
    state = {k: v.numpy() for k, v in case.reference.state_dict().items()}
    content = hub_names(case) if naming == "hub" else state
    assert set(content) != set(tensors(case.directory))  # a third way, by this transformers
    if naming == "hub":
        old = np.arange(17)[None]
        content["vision_tower.vision_model.embeddings.position_ids"] = old
        full = json.loads((pictures.GOLDEN / "llava16_mistral_keys.json").read_text())
        assert {k for k in hub_names(case) if "layers" not in k} == {
            k for k in full if "layers" not in k
        }
    safetensors.numpy.save_file(content, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((case.directory / "config.json").read_text())
    loaded = parity.split(models.load(tmp_path))[1]
    for path, value in flatten(parity.split(models.load(case.directory))[1]).items():
        np.testing.assert_array_equal(flatten(loaded)[path], value, err_msg=path)
    models.save(tmp_path / "out", loaded, hf.read_config(case.directory))
    written, expected = tensors(tmp_path / "out"), hub_names(case)
    assert set(written) == set(expected)
    for name, value in expected.items():
        assert written[name].dtype == value.dtype
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    again = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(again[1][kind] for kind in ("missing_keys", "unexpected_keys"))
    for name, value in again[0].state_dict().items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


def test_the_published_config_and_every_key_of_the_published_files():
    """config.json as on the hub: it leaves out what equals transformers' defaults."""
    parsed = models.CLASSES["llava_next"].parse(PUBLISHED)
    text = parsed.text
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (4096, 32, 32)
    assert (text.head_dim, text.num_key_value_heads, text.rope_theta) == (128, 8, 1e6)
    assert text.sliding_window is None and text.rms_norm_eps == 1e-5
    expected = json.loads((pictures.GOLDEN / "llava16_mistral_keys.json").read_text())
    assert len(expected) == 687
    pictures.assert_keys_are(PUBLISHED, expected)
    model = nnx.eval_shape(lambda: models.build(PUBLISHED, rngs=nnx.Rngs(0)))
    grids = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert model.image_spec == ImageSpec("llava_anyres", 336, 576, grids=grids)
    assert model.embedding_width == 4096


PUBLISHED = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000,
    "model_type": "llava_next",
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["MistralForCausalLM"],
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "use_image_newline_parameter": True,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_silent_keys_take_the_defaults_of_transformers(kind):
    full = transformers.LlavaNextConfig(text_config={"model_type": kind})
    brief = {"model_type": "llava_next", "text_config": {"model_type": kind}}
    assert Llava16Config.from_hf(brief).text == Llava16Config.from_hf(full.to_dict()).text
    brief["vision_config"] = {"image_size": 336, "patch_size": 14}
    full = transformers.LlavaNextConfig(vision_config=dict(brief["vision_config"]))
    assert Llava16Config.from_hf(brief).vision == Llava16Config.from_hf(full.to_dict()).vision
    nothing = Llava16Config.from_hf({"model_type": "llava_next"})
    assert nothing == Llava16Config.from_hf(transformers.LlavaNextConfig().to_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer = \[-2, -5\]"),
        ({"vision_feature_layer": -1}, "vision_feature_layer = -1"),
        ({"vision_feature_select_strategy": "full"}, "strategy = 'full'"),
        ({"text_config": {"model_type": "qwen2"}}, "text_config.model_type = 'qwen2'"),
        ({"text_config": {**TEXT, "hidden_act": "gelu"}}, "hidden_act = 'gelu'"),
        ({"vision_config": {**VISION, "hidden_act": "gelu"}}, "vision_config.hidden_act = 'gelu'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.model_type"),
        ({"vision_config": {**VISION, "patch_size": 6}}, "must be a multiple of patch_size"),
        ({"image_grid_pinpoints": [[30, 28]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": 336}, "image_grid_pinpoints = 336 must be a list"),
        ({"image_grid_pinpoints": ["28"]}, "image_grid_pinpoints: 28 is no"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"text_config": "mistral"}, "text_config = 'mistral' must be an object"),
        ({"vision_config": []}, r"vision_config = \[\] must be an object"),
    ],
)
def test_configs_that_would_compute_something_else_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Llava16Config.from_hf({**config_of("llama"), **changes})
