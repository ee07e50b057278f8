"""BERT against transformers, on a tiny random config and on the real teacher."""

import json

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
from unime_jax.models import bert, hf
from unime_jax.types import UserError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "layer_norm_eps": 1e-12,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    reference = transformers.BertModel(
        transformers.BertConfig(**SIZES, attn_implementation="eager")
    ).eval()
    parity.randomise(reference)
    directory = tmp_path_factory.mktemp("bert")
    reference.save_pretrained(directory)
    return reference, directory


def pooled(reference, inputs, pooling):
    mask = torch.tensor(parity.mask(inputs))
    tokens = torch.tensor(inputs.tokens).long()
    hidden = reference(tokens, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    vector = hidden[:, 0] if pooling == "cls" else mean
    return hidden, torch.nn.functional.normalize(vector, dim=-1)


def with_pooling(directory, tmp_path, modes):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    content = {"word_embedding_dimension": 24, **{f"pooling_mode_{m}": True for m in modes}}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(content))
    return tmp_path


def test_hidden_states_embeddings_and_gradients_match(pair):
    reference, directory = pair
    inputs = parity.text_inputs()
    direction = np.random.default_rng(1).standard_normal((4, 24)).astype(np.float32)
    reference.zero_grad()
    hidden, vectors = pooled(reference, inputs, "mean")
    (vectors * torch.tensor(direction)).sum().backward()
    expected = {
        name: p.grad.numpy()
        for name, p in reference.named_parameters()
        # Softmax does not see a constant added to all scores: this gradient is noise around 0.
        if p.grad is not None and not name.endswith("key.bias")
    }

    model = models.load(directory)
    real = parity.mask(inputs) == 1
    tolerances.assert_near(
        parity.hidden(model, inputs)[real], hidden.detach().numpy()[real], tolerances.HIDDEN
    )
    graphdef, params = parity.split(model)

    def loss(params):
        out = nnx.merge(graphdef, params).embed(inputs)
        return jnp.sum(out * direction), out

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    tolerances.assert_near(ours, vectors.detach(), tolerances.EMBEDDING)
    exported = hf.exported(gradients, models.rules(hf.read_config(directory)), np.float32)
    actual = {name: x for name, x in exported if not name.endswith("key.bias")}
    tolerances.assert_gradients_near(actual, expected)


def test_padding_and_batch_mates_do_not_matter(pair):
    model = models.load(pair[1])
    short, long = parity.text_inputs((5,)), parity.text_inputs((5, 11))
    long.tokens[0, :5] = short.tokens
    tolerances.assert_near(
        parity.embed(model, short)[0], parity.embed(model, long)[0], tolerances.EMBEDDING
    )


@pytest.mark.parametrize(("modes", "pooling"), [(["mean_tokens"], "mean"), (["cls_token"], "cls")])
def test_pooling_is_that_of_the_directory(pair, tmp_path, modes, pooling):
    reference, directory = pair
    model = models.load(with_pooling(directory, tmp_path, modes))
    assert model.config.pooling == pooling
    inputs = parity.text_inputs()
    _, expected = pooled(reference, inputs, pooling)
    tolerances.assert_near(parity.embed(model, inputs), expected.detach(), tolerances.EMBEDDING)


@pytest.mark.parametrize("modes", [["max_tokens"], ["mean_tokens", "cls_token"], []])
def test_other_poolings_are_refused(pair, tmp_path, modes):
    with pytest.raises(UserError, match="1_Pooling/config.json: only mean_tokens or cls_token"):
        models.load(with_pooling(pair[1], tmp_path, modes))


def test_keys_of_other_heads_are_understood(pair, tmp_path):
    reference, directory = pair
    head = transformers.BertForMaskedLM(reference.config)
    head.bert.load_state_dict(reference.state_dict(), strict=False)
    head.save_pretrained(tmp_path)
    inputs = parity.text_inputs((3,))
    np.testing.assert_array_equal(
        parity.embed(models.load(tmp_path), inputs), parity.embed(models.load(directory), inputs)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"pooling": "max"}, "pooling 'max' is unknown"),
        ({"type_vocab_size": None}, "lacks type_vocab_size"),
    ],
)
def test_configs_that_would_compute_something_else_are_refused(changes, words):
    config = {**SIZES, "type_vocab_size": 2, **changes}
    with pytest.raises(UserError, match=words):
        bert.BertConfig.from_hf({k: v for k, v in config.items() if v is not None})


def test_rows_longer_than_the_position_table_are_refused(pair):
    model = models.load(pair[1])
    with pytest.raises(
        UserError, match="17 tokens exceed the model's max_position_embeddings of 16"
    ):
        model.embed(parity.text_inputs((17,)))


@pytest.mark.assets
def test_minilm_matches_transformers(assets):
    reference = transformers.AutoModel.from_pretrained(assets / "teacher").eval()
    inputs = parity.text_inputs((24, 7), vocabulary=30522)
    with torch.no_grad():
        _, expected = pooled(reference, inputs, "mean")
    model = models.load(assets / "teacher")
    assert model.embedding_width == 384 and model.image_spec is None
    tolerances.assert_near(parity.embed(model, inputs), expected, tolerances.EMBEDDING)


def test_modules_behind_the_pooling_are_refused(pair, tmp_path):
    directory = with_pooling(pair[1], tmp_path, ["mean_tokens"])
    kinds = ["Transformer", "Pooling", "Normalize", "Dense"]
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (directory / "modules.json").write_text(json.dumps(modules[:3]))
    assert models.read_config(directory)["pooling"] == "mean"
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="models.Dense is not supported"):
        models.read_config(directory)
    (directory / "modules.json").write_text("{")
    with pytest.raises(UserError, match="modules.json cannot be read"):
        models.read_config(directory)
