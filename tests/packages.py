"""Miniature packages of every kind that `prepare smol` reads, built on the spot."""

import hashlib
import io
import json
import pathlib
import shutil
import struct
import subprocess
import zipfile

import numpy as np
import pytest
from PIL import Image

from unime_jax.data import assets, smol

ANIMALS = "cat dog fox owl bee cow pig rat hen ant bat elk emu yak ape eel cod jay kid ram".split()
COLOURS = ["red", "green", "blue"]


def png(colour="red", size=(20, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def shade(number: int, variant: int = 0) -> tuple[int, int, int]:
    """Gives pictures colours far enough apart to be different pictures."""
    return (12 * number % 256, 36 * variant, 97 * number % 256)


def wheel(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def deb(path: pathlib.Path, name: str, files: dict[str, bytes]) -> pathlib.Path:
    """Builds a Debian package with dpkg-deb; skips the test where there is none."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb")
    root = path.parent / f"tree-{name}"
    for file, content in {
        "DEBIAN/control": f"Package: {name}\nVersion: 1\nArchitecture: all\n"
        "Maintainer: nobody <nobody@example.org>\nDescription: test\n".encode(),
        **files,
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", root, path],
        check=True,
        capture_output=True,
    )
    return path


def gguf_file(path: pathlib.Path, *, layers=3, width=16, heads=4, kv_heads=2, ff=32) -> dict:
    """Writes a tiny SmolLM2; returns its weights as published, q and k not permuted."""
    import gguf

    rng = np.random.default_rng(0)
    alphabet = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "Ġc", "at", "12"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ c", "a t", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    head = width // heads
    published = {"model.embed_tokens.weight": (len(tokens), width), "model.norm.weight": (width,)}
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for layer in range(layers):
        for part, ours, shape in (
            ("attn_norm", "input_layernorm", (width,)),
            ("attn_q", "self_attn.q_proj", (heads * head, width)),
            ("attn_k", "self_attn.k_proj", (kv_heads * head, width)),
            ("attn_v", "self_attn.v_proj", (kv_heads * head, width)),
            ("attn_output", "self_attn.o_proj", (width, heads * head)),
            ("ffn_norm", "post_attention_layernorm", (width,)),
            ("ffn_gate", "mlp.gate_proj", (ff, width)),
            ("ffn_up", "mlp.up_proj", (ff, width)),
            ("ffn_down", "mlp.down_proj", (width, ff)),
        ):
            key = f"model.layers.{layer}.{ours}.weight"
            published[key], names[key] = shape, f"blk.{layer}.{part}.weight"
    published = {k: rng.normal(size=s).astype(np.float32) for k, s in published.items()}
    for key, array in published.items():
        count = heads if "q_proj" in key else kv_heads if "k_proj" in key else None
        if count:  # llama.cpp's converter: the two halves of each head interleaved
            rows = array.reshape(count, 2, head // 2, width).swapaxes(1, 2)
            array = np.ascontiguousarray(rows.reshape(count * head, width))
        writer.add_tensor(names[key], array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return published


def legacy_pth(tensors: dict) -> bytes:
    """Saves numpy arrays as `torch.save` did before its zip format."""
    import torch

    file = io.BytesIO()
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def wordnet_files() -> dict[str, bytes]:
    """Writes a WordNet of animals (noun.animal) and of verbs that have examples."""
    nouns, index = [], []
    for i, animal in enumerate(ANIMALS):
        nouns.append(
            f"{i:08d} 05 n 01 {animal} 0 000 | an animal of kind number {i} called that way"
        )
        index.append(f"{animal} n 1 0 1 0 {i:08d}  ")
    verbs = [
        f"{i:08d} 30 v 01 act{i} 0 000 01 + 02 00 | do the thing number {i} with great care; "
        f'"she liked to do number {i} again"'
        for i in range(200)
    ]
    empty = "  1 licence text\n"
    files = {
        "data.noun": empty + "\n".join(nouns),
        "data.verb": empty + "\n".join(verbs),
        "data.adj": empty,
        "data.adv": empty,
        "index.noun": empty + "\n".join(index),
    }
    return {name: content.encode() + b"\n" for name, content in files.items()}


def picture_files() -> dict[str, dict[str, bytes]]:
    """Makes the content of the four picture packages; some captions occur in several."""
    stamps = {}
    for i, animal in enumerate(ANIMALS):
        for j, colour in enumerate(COLOURS):
            base = f"usr/share/tuxpaint/stamps/animals/{animal}_{colour}"
            stamps[f"{base}.png"] = png(shade(i, j))
            stamps[f"{base}.txt"] = f"A {colour} {animal}.\nde.utf8=Tier\n".encode()
        stamps[f"usr/share/tuxpaint/stamps/animals/{animal}.png"] = png(shade(i, 3))
        stamps[f"usr/share/tuxpaint/stamps/animals/{animal}.txt"] = f"A {animal}.\n".encode()
    drawings = {
        f"usr/share/games/pysiogame/res/images/art4apps/animals/{animal}.jpg": png(shade(i, 4))
        for i, animal in enumerate(ANIMALS)
    }
    clipart = {
        f"usr/share/openclipart/png/animals/{animal}_gerald_g._01.png": png(shade(i, 5))
        for i, animal in enumerate(ANIMALS)
    }
    notes = "".join(
        f'<annotation cp="{chr(0x1F400 + i)}">{animal} | animal</annotation>'
        f'<annotation cp="{chr(0x1F400 + i)}" type="tts">{animal}</annotation>'
        for i, animal in enumerate(ANIMALS)
    )
    cldr = "usr/share/unicode/cldr/common/annotations/en.xml"
    return {
        "tuxpaint": stamps,
        "art4apps": drawings,
        "openclipart": clipart,
        "emoji names": {cldr: f"<ldml>{notes}</ldml>".encode()},
        "emoji": {"usr/share/fonts/truetype/noto/NotoColorEmoji.ttf": b"not a font"},
    }


def build_all(directory: pathlib.Path) -> dict[str, assets.Package]:
    """Builds every package into `directory`; returns what replaces `smol.PACKAGES`."""
    directory.mkdir(parents=True, exist_ok=True)
    gguf_path = directory / "tiny.gguf"
    gguf_file(gguf_path)
    pth = legacy_pth({"_conv_stem.weight": np.ones((2, 3, 3, 3), np.float32)})
    teacher = {f"t/model/{name}": b"{}" for name in smol.smol_student.TEACHER_FILES}
    made = {
        "language model": wheel(
            directory / "lm-1-py3-none-any.whl", {"a/x.gguf": gguf_path.read_bytes()}
        ),
        "vision tower": wheel(directory / "tower-1-py3-none-any.whl", {"a/models/x.pth": pth}),
        "teacher": wheel(directory / "teacher-1-py3-none-any.whl", teacher),
    }
    gguf_path.unlink()
    words = {"usr/share/wordnet/" + name: text for name, text in wordnet_files().items()}
    for what, files in {"wordnet": words, **picture_files()}.items():
        name = what.replace(" ", "-")
        made[what] = deb(directory / f"{name}_1_all.deb", name, files)
    names = {"language model": "lm", "vision tower": "tower"}
    return {
        what: assets.Package(
            names.get(what, what.replace(" ", "-")),
            "debian" if path.suffix == ".deb" else "pypi",
            "1",
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_size,
            "test",
        )
        for what, path in made.items()
    }


def jsonl(directory: pathlib.Path, count: int = 40) -> pathlib.Path:
    """Writes a pairs.jsonl with its images."""
    lines = []
    for i in range(count):
        (directory / f"{i}.png").write_bytes(png(shade(i)))
        lines.append(json.dumps({"image": f"{i}.png", "text": f"thing {i}"}))
    path = directory / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return path


def bomb(width: int = 40000, height: int = 40000) -> bytes:
    """Makes a PNG whose header promises far more pixels than it holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, content):
        import zlib

        return (
            struct.pack(">I", len(content)) + kind + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )  # fmt: skip

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
