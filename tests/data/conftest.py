"""Tiny tokenizer directories."""

import json

import packages
import pytest

from unime_jax.data import smol_student


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """A directory with the byte-level tokenizer of the miniature language model."""
    directory = tmp_path_factory.mktemp("byte-level")
    packages.gguf_file(directory / "x.gguf")
    text, config = smol_student.LanguageModel(directory / "x.gguf").tokenizer()
    (directory / "tokenizer.json").write_text(text)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory):
    """A tokenizer that starts rows with <s>, writes spaces as part of words, and has </s>."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    words = "<unk> <s> </s> ▁ ▁Instruct: ▁Find ▁it \n Query: ▁a ▁cat s".split(" ")
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(words[:3])
    directory = tmp_path_factory.mktemp("llama-like")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def word_piece(tmp_path_factory):
    """A BERT-like tokenizer, saved with truncation and padding switched on."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "##s", "dog", "[", "]", "sep"]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(words[:4])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    directory = tmp_path_factory.mktemp("word-piece")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
