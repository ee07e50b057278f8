"""Decoders against transformers, on tiny random configs, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tolerances
import torch
import transformers
from flax import nnx

from unime_jax import models
from unime_jax.models import decoder, hf, layers
from unime_jax.models.decoder import DecoderConfig, TextEmbedder
from unime_jax.types import Inputs, UserError, flatten

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
CASES = {
    "llama-mha": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "llama-gqa-tied": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama-mqa-bias": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral-head-dim": (
        transformers.MistralConfig,
        {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": None},
    ),
    "phi3-fused": (transformers.Phi3Config, {"num_key_value_heads": 2, "sliding_window": None}),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(the torch model, its directory)."""
    cls, changes = CASES[request.param]
    torch.manual_seed(0)
    config = cls(**{**COMMON, **changes})
    reference = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    parity.randomise(reference)
    directory = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(directory)
    return reference, directory


def run(reference, inputs):
    """Hidden states after the final norm, and next-token scores."""
    out = reference(
        torch.tensor(inputs.tokens).long(),
        attention_mask=torch.tensor(parity.mask(inputs)),
        output_hidden_states=True,
    )
    return out.hidden_states[-1], out.logits


def test_hidden_states_and_logits_match(pair):
    reference, directory = pair
    model, inputs = models.load(directory), parity.text_inputs()
    hidden, logits = (x.detach().numpy() for x in run(reference, inputs))
    ours = parity.hidden(model, inputs)
    real = parity.mask(inputs) == 1
    tolerances.assert_near(ours[real], hidden[real], tolerances.HIDDEN)
    scores = np.asarray(model.language_model.logits(jnp.asarray(ours)))
    tolerances.assert_near(scores[real], logits[real], tolerances.HIDDEN)


def test_embeddings_and_all_gradients_match(pair):
    reference, directory = pair
    inputs = parity.text_inputs()
    direction = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)

    reference.zero_grad()
    hidden, _ = run(reference, inputs)
    last = hidden[torch.arange(4), torch.tensor(inputs.lengths).long() - 1]
    embedding = torch.nn.functional.normalize(last, dim=-1)
    (embedding * torch.tensor(direction)).sum().backward()
    expected = {
        name: p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None
    }

    graphdef, params = parity.split(models.load(directory))

    def loss(params):
        out = nnx.merge(graphdef, params).embed(inputs)
        return jnp.sum(out * direction), out

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    tolerances.assert_near(ours, embedding.detach(), tolerances.EMBEDDING)
    rules = models.rules(hf.read_config(directory))
    actual = dict(hf.exported(gradients, rules, np.float32))
    actual.pop("lm_head.weight", None)  # embeddings do not use it
    tolerances.assert_gradients_near(actual, expected)


def test_round_trip_to_transformers_is_exact_and_strict(pair, tmp_path):
    reference, directory = pair
    _, params = parity.split(models.load(directory))
    models.save(tmp_path, params, models.read_config(directory))
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in reference.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def tiny(**changes):
    return parity.build({**parity.TEXT, **changes})


def test_padding_and_batch_mates_do_not_matter():
    model, inputs = tiny(), parity.text_inputs((9, 5, 1, 12))
    together = parity.embed(model, inputs)
    for row, length in ((1, 5), (2, 1)):
        alone = Inputs(
            inputs.tokens[row : row + 1, :length],
            inputs.lengths[row : row + 1],
            inputs.image_index[row : row + 1, :length],
            inputs.tiles[row : row + 1],
        )
        tolerances.assert_near(parity.embed(model, alone)[0], together[row], tolerances.EMBEDDING)


@pytest.mark.parametrize("causal", [True, False])
def test_positions_see_what_they_should(causal):
    """The gradient of one position's output with respect to every position's input."""
    config = DecoderConfig.from_hf(parity.TEXT, causal=causal)
    model = TextEmbedder(config, rngs=nnx.Rngs(0)).language_model
    embeds = jax.random.normal(jax.random.key(0), (1, 6, 32))
    lengths = jnp.array([5])
    gradient = jax.jit(jax.grad(lambda x: model(x, lengths)[0, 2].sum()))(embeds)
    seen = np.abs(np.asarray(gradient))[0].max(-1) > 0
    assert list(seen) == ([True] * 3 + [False] * 3 if causal else [True] * 5 + [False])


def test_bidirectional_decoder_ignores_padding():
    config = DecoderConfig.from_hf(parity.TEXT, causal=False)
    model = TextEmbedder(config, rngs=nnx.Rngs(0))
    short, long = parity.text_inputs((5,)), parity.text_inputs((5,), tokens=11)
    long.tokens[:, :5] = short.tokens
    tolerances.assert_near(
        parity.embed(model, short), parity.embed(model, long), tolerances.EMBEDDING
    )


@pytest.mark.parametrize(("kind", "causal"), [("llama", True), ("llama", False), ("phi3", True)])
def test_narrow_last_layer_changes_nothing(kind, causal, monkeypatch):
    """Computing the last layer for the last token alone, against all positions; gradients too."""
    inputs = parity.text_inputs()
    config = {**parity.TEXT, "model_type": kind, "num_hidden_layers": 2}
    parsed = DecoderConfig.from_hf(config, causal=causal)
    model = nnx.eval_shape(lambda: TextEmbedder(parsed, rngs=nnx.Rngs(0)))
    graphdef, _ = parity.split(model)
    _, params = parity.split(parity.build(config))

    def loss(params):
        return nnx.merge(graphdef, params).embed(inputs)[:, 0].sum()

    narrow = jax.jit(jax.value_and_grad(loss))(params)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "NARROW_LAYERS", 0)
        whole = jax.jit(jax.value_and_grad(lambda p: loss(p)))(params)
    tolerances.assert_near(narrow[0], whole[0], tolerances.EMBEDDING)
    own, expected = flatten(narrow[1]), flatten(whole[1])
    tolerances.assert_gradients_near(own, expected)


@pytest.mark.parametrize(
    ("placement", "narrow"),
    [
        (None, False),  # anything may be trained
        (layers.Placement(trainable=frozenset({"mlp/down_proj/kernel"})), False),
        (layers.Placement(trainable=frozenset({"input_layernorm/scale"})), True),
        (layers.Placement(read_only=True), True),
    ],
    ids=["unknown", "trained", "frozen", "read only"],
)
def test_deep_models_narrow_their_last_layer_where_it_copies_little(placement, narrow, monkeypatch):
    monkeypatch.setattr(decoder, "NARROW_LAYERS", 0)
    graphdef, params = parity.split(parity.build(parity.TEXT))

    def embed(params):
        with layers.placed(placement):
            return nnx.merge(graphdef, params).embed(parity.text_inputs())

    program = str(jax.make_jaxpr(embed)(params))
    inner = parity.TEXT["intermediate_size"]
    rows = len(parity.text_inputs().lengths)
    assert (f"f32[{rows},1,{inner}] = logistic" in program) == narrow


def test_remat_changes_nothing():
    inputs = parity.text_inputs()
    values = []
    for remat in ("none", "dots", "full"):
        model = parity.build(parity.TEXT, remat=remat)
        graphdef, params = parity.split(model)
        loss = lambda p: nnx.merge(graphdef, p).embed(inputs)[:, 0].sum()  # noqa: B023, E731
        values.append(jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params)))
    for other in values[1:]:
        for a, b in zip(values[0], other, strict=True):
            tolerances.assert_near(a, b, tolerances.MODULE)


def test_bf16_is_near_f32():
    inputs = parity.text_inputs()
    graphdef, params = parity.split(parity.build(parity.TEXT, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    half = parity.embed(nnx.merge(graphdef, params), inputs)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    full = parity.embed(nnx.merge(nnx.split(tiny())[0], wide), inputs)
    assert half.dtype == jnp.float32
    assert np.min(np.sum(half * full, -1)) > 0.999


def test_rope_settings_of_either_transformers_version_are_read():
    old = {**parity.TEXT, "rope_theta": 5e5}
    new = {k: v for k, v in parity.TEXT.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)
    assert DecoderConfig.from_hf(old).rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling = 'llama3'"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"hidden_size": "64"}, "hidden_size = '64' must be a positive whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True must be"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan must be a positive number"),
        ({"rope_theta": "x"}, "rope_theta = 'x' must be"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads = 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "and hidden_size = .* one of it"),
    ],
)
def test_configs_that_would_compute_something_else_are_refused(changes, words):
    config = {k: v for k, v in {**parity.TEXT, **changes}.items() if v is not None}
    with pytest.raises(UserError, match=words):
        DecoderConfig.from_hf(config)


def test_rows_longer_than_the_sliding_window_are_refused():
    model = parity.build({**parity.TEXT, "model_type": "mistral", "sliding_window": 8})
    jax.eval_shape(model.embed, parity.text_inputs((8,)))
    with pytest.raises(UserError, match="9 tokens exceed the model's sliding_window of 8"):
        model.embed(parity.text_inputs((9,)))


@pytest.mark.assets
def test_smollm2_matches_transformers(assets, tmp_path):
    """The real language model: its keys, RoPE order and numbers."""
    import safetensors.numpy

    config = hf.read_config(assets / "student")["text_config"]
    tensors = safetensors.numpy.load_file(assets / "student" / "model.safetensors")
    prefix = "language_model."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    missing, unexpected = reference.load_state_dict(
        {name: torch.tensor(value) for name, value in own.items()}, strict=False
    )
    assert missing == ["lm_head.weight"] and not unexpected
    reference.tie_weights()
    inputs = parity.text_inputs((24, 7), vocabulary=config["vocab_size"])
    with torch.no_grad():
        hidden, _ = run(reference, inputs)
    model = models.load(assets / "student")
    real = parity.mask(inputs) == 1
    error = parity.hidden(model, inputs)[real] - hidden.numpy()[real]
    assert np.abs(error).max() < tolerances.HIDDEN * np.abs(hidden.numpy()).max()
    last = hidden.numpy()[[0, 1], inputs.lengths - 1]
    expected = last / np.linalg.norm(last, axis=-1, keepdims=True)
    tolerances.assert_near(parity.embed(model, inputs), expected, tolerances.EMBEDDING)
