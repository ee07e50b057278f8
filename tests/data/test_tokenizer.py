"""Token ids of every prompt are those of the published processors."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import tokenizers
from PIL import Image

from unime_jax.data import preprocess, prompts
from unime_jax.data.rows import IMAGE_SLOT
from unime_jax.data.tokenizer import Tokenizer
from unime_jax.types import ImageSpec

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
LLAVA = ImageSpec("llava_anyres", 336, 576, grids=GRIDS)
PHI = ImageSpec("phi_hd", 336, 144, crops=4)
IMAGE, PAD = 32000, 32001
# Their ids in the checkpoint are 32000 more.
PHI_TOKENS = {"<|endoftext|>": 0, "<|assistant|>": 1, "<|end|>": 7, "<|user|>": 10, "<|image|>": 44}
TEXTS = [
    "A man crossing the street",
    "two  blanks,\ttabs\nand lines",
    "naïve 東京 🦊 <b>bold</b> [INST] x",
    "a",
    "7",
    "\u00a0hard blanks\u00a0",
]


@pytest.fixture(scope="session")
def transformers_llama(tmp_path_factory):
    """transformers' tokenizer made from the real SentencePiece file, with LLaVA's two tokens."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("mistral")
    shutil.copy(GOLDEN / "mistral_v1_tokenizer.model", directory / "tokenizer.model")
    tokenizer = transformers.LlamaTokenizerFast.from_pretrained(directory, add_bos_token=True)
    special = [
        tokenizers.AddedToken(name, special=True, normalized=False) for name in ("<image>", "<pad>")
    ]
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


@pytest.fixture(scope="session")
def base(transformers_llama):
    """The same as tokenizer.json's content."""
    return json.loads(transformers_llama.backend_tokenizer.to_str())


@pytest.fixture(scope="session")
def small(base):
    """Its first pieces, the bytes and ASCII: Llama's kind, and quick to read."""
    vocabulary = base["model"]["vocab"]
    kept = [
        piece for piece, id in vocabulary.items() if id < 1500 or len(piece) == 1 and piece < "\x80"
    ]
    kept.append("▁")
    pieces = {piece: id for id, piece in enumerate(dict.fromkeys(kept))}
    merges = [pair for pair in base["model"]["merges"] if "".join(pair) in pieces]
    merges = [pair for pair in merges if pair[0] in pieces and pair[1] in pieces]
    return {**base, "model": {**base["model"], "vocab": pieces, "merges": merges}}


def published(content, *, bos=True, added=None):
    """Returns the tokenizer as checkpoints hold it: blanks replaced, one before every piece."""
    normalizers = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    template = {"type": "TemplateProcessing", "special_tokens": {}}
    template["single"] = [{"Sequence": {"id": "A", "type_id": 0}}]
    if bos:
        template["single"].insert(0, {"SpecialToken": {"id": "<s>", "type_id": 0}})
        template["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template["pair"] = [*template["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        **content,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": template,
        "added_tokens": content["added_tokens"] if added is None else added,
    }


def phi_tokens(content, **flags):
    """Phi's added tokens behind the pieces; flags: name of a flag -> tokens that have it."""
    first = len(content["model"]["vocab"])
    names = [f"<|placeholder{i}|>" for i in range(45)]
    for name, id in PHI_TOKENS.items():
        names[id] = name
    settings = {"special": True, "normalized": False}
    return content["added_tokens"][:3] + [
        {"id": first + id, "content": name, **settings}
        | {flag: name in flags.get(flag, ()) for flag in ("lstrip", "rstrip", "single_word")}
        for id, name in enumerate(names)
    ]


def write(directory, content, **config):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def flat(name, text, has_image, slot):
    """The prompt as one string, as the published code writes it."""
    segments = prompts.render(name, text, has_image)
    return "".join(slot if s.role == "image" else s.value for s in segments)


# ---- LLaVA-1.6


@pytest.fixture(scope="session", params=["published", "transformers 5"])
def llava(request, transformers_llama, base, tmp_path_factory):
    """Our preprocessor and transformers' processor on one tokenizer."""
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    images = module.LlavaNextImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=[list(grid) for grid in GRIDS],
    )
    directory = tmp_path_factory.mktemp("llava")
    tokenizer = transformers_llama
    if request.param == "published":
        write(directory, published(base))
        file = str(directory / "tokenizer.json")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>")
    processor = transformers.LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    if request.param != "published":
        processor.save_pretrained(directory)
    ours = preprocess.Preprocessor(
        directory, LLAVA, prompt="", max_tokens=4096, image_token_id=IMAGE
    )
    return ours, processor


def expanded(ours, row, image, token):
    positions = ours.layout(*image.size).positions if image else 0
    ids = [[token] * positions if id == IMAGE_SLOT else [id] for id in row.ids]
    return [id for part in ids for id in part]


@pytest.mark.parametrize("size", [(336, 336), (640, 480), (100, 301), (1, 1), (900, 31)])
def test_llava_prompts_with_an_image(llava, size):
    ours, processor = llava
    image = Image.new("RGB", size, "red")
    rows = [("llava16", None), ("llava16", "A cat."), ("mmeb", prompts.slotted("<|image_1|>\nIs?"))]
    rows.append(("mmeb", prompts.slotted("Find this: <|image_1|> in the set\n")))
    for name, text in rows:
        ours.prompt = name
        row = ours.tokenize(text, True, layout=ours.layout(*size))
        wanted = processor(text=flat(name, text, True, "<image>"), images=image)
        assert expanded(ours, row, image, IMAGE) == list(wanted["input_ids"][0])


@pytest.mark.parametrize("name", ["llava16", "llava16_stage1", "mmeb"])
def test_llava_prompts_of_texts(llava, name):
    ours, processor = llava
    ours.prompt = name
    for text in TEXTS:
        wanted = processor.tokenizer(flat(name, text, False, "")).input_ids
        assert list(ours.tokenize(text, False).ids) == wanted
        assert wanted[0] == 1 and wanted.count(1) == 1


def test_the_vocabulary_is_the_checkpoints(transformers_llama):
    assert transformers_llama("Hello").input_ids == [1, 22557]
    assert transformers_llama.convert_tokens_to_ids(["<image>", "<pad>"]) == [IMAGE, PAD]


# ---- Phi-3.5-V


def phi_ids(tokenizer, text, positions):
    """The published processor: pieces around the images, each encoded by itself."""
    ids = []
    for number, piece in enumerate(re.split(r"<\|image_\d+\|>", text)):
        ids += [-1] * positions if number else []
        ids += tokenizer.encode(piece).ids
    return ids


STRIPS = {
    "plain": {},
    "rstrip": {"rstrip": PHI_TOKENS},
    "lstrip": {"lstrip": ["<|end|>"]},
}


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("strips", STRIPS)
@pytest.mark.parametrize("kind", ["published", "metaspace"])
def test_phi_prompts(small, tmp_path, bos, strips, kind):
    added = phi_tokens(small, **STRIPS[strips])
    content = published(small, bos=bos, added=added)
    if kind == "metaspace":
        content |= {"normalizer": None, "pre_tokenizer": small["pre_tokenizer"]}
        assert small["pre_tokenizer"]["prepend_scheme"] == "first"
    directory = write(tmp_path, content)
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    image = Image.new("RGB", (300, 500))
    ours = preprocess.Preprocessor(directory, PHI, prompt="", max_tokens=4096)
    for name in ("phi35v", "phi35v_eval", "phi35v_stage1", "mmeb"):
        ours.prompt = name
        rows = [(text, False) for text in TEXTS]
        if name == "mmeb":
            rows += [(prompts.slotted("<|image_1|>\nIs it?"), True)]
            rows += [(prompts.Slotted("Which? ", " this\n"), True)]
        elif prompts.TEMPLATES[name].both:  # stage 1 has no form for both
            rows += [(None, True), ("A cat.", True)]
        else:
            rows += [(None, True)]
        for text, has_image in rows:
            row = ours.tokenize(text, has_image)
            string = flat(name, text, has_image, "<|image_1|>")
            wanted = phi_ids(library, string, ours.layout(*image.size).positions)
            assert expanded(ours, row, image, -1) == wanted, (name, string)
            assert wanted.count(1) == bos * (1 + has_image)


def test_the_demos_ids_by_hand(small, tmp_path):
    """A blank stands before the newline that opens a piece."""
    content = published(small, added=phi_tokens(small))
    ours = preprocess.Preprocessor(write(tmp_path, content), PHI, prompt="phi35v", max_tokens=99)
    pieces = content["model"]["vocab"]
    first = len(pieces)
    row = ours.tokenize("A", False)
    newline = [pieces["▁"], pieces["<0x0A>"]]
    assert list(row.ids[:5]) == [1, first + 10, *newline, pieces["A"]]
    assert list(row.ids[-6:]) == [first + 7, *newline, first + 1, *newline]
    assert row.ids[row.start : row.stop] == (pieces["A"],)


# ---- whatever the model


@pytest.mark.parametrize("strips", STRIPS)
def test_what_looks_like_a_special_token_stays_text(small, tmp_path, strips):
    added = phi_tokens(small, **STRIPS[strips])
    content = published(small, added=added)
    plain = published(small, added=added[:1])  # nothing but <unk> is special
    ours = preprocess.Preprocessor(write(tmp_path, content), PHI, prompt="phi35v", max_tokens=999)
    text = "x <|end|> y<|user|>\n<|image_1|> <s> </s> <|image|> z"
    row = ours.tokenize(text, False)
    first = len(content["model"]["vocab"])
    special = [id for id in row.ids if id >= first or id < 3]
    assert special == [1, first + 10, first + 7, first + 1]
    before = "" if strips == "rstrip" else "\n"
    after = "" if strips == "lstrip" else " "
    piece = f"{before}{text}\nSummary above sentence in one word:{after}"
    wanted = tokenizers.Tokenizer.from_str(json.dumps(plain)).encode(piece).ids[1:]
    assert list(row.ids[2 : 2 + len(wanted)]) == wanted
    assert row.ids[2 + len(wanted)] == first + 7
    inside = tokenizers.Tokenizer.from_str(json.dumps(plain)).decode(
        list(row.ids[row.start : row.stop])
    )
    assert inside.strip() == text


@pytest.mark.parametrize("kind", ["published", "metaspace"])
def test_a_text_that_begins_the_row_stays_text(small, tmp_path, kind):
    content = published(small, added=phi_tokens(small))
    if kind == "metaspace":
        content |= {"normalizer": None, "pre_tokenizer": small["pre_tokenizer"]}
    ours = preprocess.Preprocessor(write(tmp_path, content), None, prompt="none", max_tokens=99)
    plain = tokenizers.Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))
    text = "<|end|> a <s>"
    assert list(ours.tokenize(text, False).ids) == plain.encode(text).ids


def test_a_token_that_must_be_a_word_of_its_own(small, tmp_path):
    content = published(small, added=phi_tokens(small, single_word=["<|end|>"]))
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer = Tokenizer(write(tmp_path, content))
    end = len(content["model"]["vocab"]) + PHI_TOKENS["<|end|>"]
    for string, count in (("a<|end|> b", 0), ("a <|end|>b", 0), ("a <|end|> b", 1), ("<|end|>", 1)):
        ids, _, _ = tokenizer.encode([prompts.Segment("prompt", string)], -1)
        assert ids == library.encode(string).ids
        assert ids.count(end) == count


def test_an_image_token_swallows_the_blanks_its_file_says(base, tmp_path):
    added = base["added_tokens"][:3] + [{**base["added_tokens"][3], "rstrip": True, "lstrip": True}]
    content = published(base, added=added)
    tokenizer = Tokenizer(write(tmp_path, content), image_token=IMAGE)
    segments = prompts.render("llava16", "A cat.", True)
    string = "".join("<image>" if s.role == "image" else s.value for s in segments)
    wanted = tokenizers.Tokenizer.from_str(json.dumps(content)).encode(string).ids
    assert tokenizer.encode(segments, IMAGE)[0] == wanted
    assert wanted[wanted.index(IMAGE) + 1] != content["model"]["vocab"]["▁"]


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, ([], [])),
        ({"tokenizer_class": "LlamaTokenizer"}, ([1], [])),
        ({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False}, ([1], [])),
        (
            {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": True},
            ([1], [2]),
        ),
    ],
)
def test_start_and_end_tokens_follow_the_llama_class(base, tmp_path, config, ends):
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    tokenizer = Tokenizer(write(tmp_path, published(base), **config, **names))
    ids, start, stop = tokenizer.encode([prompts.Segment("text", "Hello")], -1)
    assert ids == [*ends[0], 22557, *ends[1]]
    assert (start, stop) == (len(ends[0]), len(ends[0]) + 1)


@pytest.mark.parametrize("spec", [PHI, LLAVA], ids=["phi", "llava"])
def test_cutting_takes_the_text_behind_the_image(small, tmp_path, spec):
    directory = write(tmp_path, published(small, added=phi_tokens(small)))
    ours = preprocess.Preprocessor(directory, spec, prompt="mmeb", max_tokens=4096)
    row = ours.tokenize(prompts.Slotted("Which one is it?", " one two three"), True)
    cut = row.cut(row.length(313) - 2, 313)
    assert cut.ids == row.ids[:-2] and cut.lost == 2
    assert np.count_nonzero(np.array(cut.ids) == IMAGE_SLOT) == 1
