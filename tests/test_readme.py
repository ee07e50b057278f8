"""README's examples, run as they stand: in JAX programs, exported, and in PyTorch."""

import json
import pathlib
import re
import subprocess
import sys

import fabricated
import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest
import tolerances

import unime_jax
from unime_jax import convert, embedder, models, runtime, tiny
from unime_jax.types import flatten

README = (miniature.ROOT / "README.md").read_text(encoding="utf-8")
SAME = 1e-5  # embeddings of two ways


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """JAX is at work already, with the compile cache of the tests."""
    monkeypatch.setattr(runtime, "start", lambda: None)


def blocks(title: str) -> list[str]:
    """The Python of a section."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", README, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory in which the names of the examples are there."""
    root = tmp_path_factory.mktemp("readme")
    miniature.write_all(root)
    (root / "student").rename(root / "model")
    (root / "pairs").rename(root / "photos")
    return root


@pytest.fixture(scope="module")
def programs(place):
    """What the examples in JAX leave behind; all but the last, which stands elsewhere."""
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for block in blocks("In your JAX programs")[:-1]:
            exec(block, names)
    return names


def test_cosine_search_over_a_folder(place, programs):
    model = unime_jax.load(place / "model", dtype="float32")
    images = model.embed(images=[place / path for path in programs["paths"]])
    expected = images @ model.embed(texts=["a red hat"])[0]
    assert len(expected) == 60
    tolerances.assert_near(programs["cosines"], expected, SAME)


def test_gradients_and_programs_of_others(programs):
    params, gradients = flatten(programs["params"]), flatten(programs["gradients"])
    assert params.keys() == gradients.keys()
    norms = {path: float(jnp.abs(x).max()) for path, x in gradients.items()}
    moved = [path for path, norm in norms.items() if norm > 0]
    assert "language_model/model/embed_tokens/embedding" in moved
    assert (
        not any("vision_tower" in path for path in moved)
        and np.isfinite(list(norms.values())).all()
    )
    apply, inputs, step = programs["apply"], programs["inputs"], 1e-3
    # The gradient is the slope.
    slope = sum(float((g**2).sum()) for g in gradients.values())
    ahead = jax.tree.map(lambda p, g: p + step * g / slope**0.5, programs["params"],
                         programs["gradients"])  # fmt: skip
    behind = jax.tree.map(lambda p, g: p - step * g / slope**0.5, programs["params"],
                          programs["gradients"])  # fmt: skip
    distance = programs["distance"]
    measured = (float(distance(ahead)) - float(distance(behind))) / (2 * step)
    assert abs(measured - slope**0.5) < 0.02 * slope**0.5
    head = jnp.arange(96.0).reshape(32, 3)
    found = programs["classify"](programs["params"], head, inputs)
    tolerances.assert_near(found, jax.nn.softmax(apply(programs["params"], inputs) @ head), SAME)


def test_the_exported_program_needs_none_of_this(place, programs):
    code = blocks("In your JAX programs")[-1]
    code += (
        "import sys; assert not [m for m in sys.modules if m.startswith(('unime_jax', 'flax'))]\n"
    )
    code += "np.save('found.npy', np.asarray(vectors))\n"
    # Beside it and not at the root of the repository, where the package could be imported.
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=place, check=True, env={"PATH": "", "JAX_PLATFORMS": "cpu"})
    expected = unime_jax.load(place / "model", dtype="float32").embed(
        texts=["a puppy", "a young dog"]
    )
    tolerances.assert_near(np.load(place / "found.npy"), expected, SAME)


def test_the_function_under_vmap_and_shard_map(programs):
    apply, params = programs["apply"], programs["params"]
    (group,) = programs["embedder"].preprocess(texts=["a cat", "a dog", "a fox", "an owl"])
    group = jax.tree.map(lambda x: x, group)
    plain = type(group)(group.tokens, group.lengths, group.image_index, group.tiles)
    expected = jax.jit(apply)(params, [group])
    assert "callback" not in str(jax.make_jaxpr(apply)(params, [plain]))
    pairs = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), plain)
    found = jax.jit(jax.vmap(lambda rows: apply(params, [rows])))(pairs)
    tolerances.assert_near(found.reshape(4, -1), expected, SAME)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("rows",))
    spread, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        lambda params, rows: apply(params, [rows]),
        mesh=mesh, in_specs=(whole, spread), out_specs=spread, check_vma=False,
    )  # fmt: skip
    tolerances.assert_near(jax.jit(mapped)(params, plain), expected, SAME)


# ---------------------------------------------------------------- PyTorch


def export(place, base, output, *flags):
    run = fabricated.write_run(
        place / f"{output}-run", base, models.read_config(base), seed=1, scale=0.1
    )
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**settings, "data": {"image_size": 336}}))
    arguments = ["export", "--model", run, "--output", place / output, *flags]
    convert.main(["convert", *map(str, arguments)])
    return embedder.load(run, dtype="float32")


def run_block(place, number: int) -> np.ndarray:
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        exec(blocks("In PyTorch")[number], names)
    return np.asarray(names["vectors"])


def test_llava_in_transformers(place):
    import transformers

    base = pathlib.Path(tiny.backbone("llava16", place / "llava"))
    config = models.read_config(base)
    vision = config["vision_config"]
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": vision["image_size"]}, crop_size=size,
        image_grid_pinpoints=config["image_grid_pinpoints"],
    )  # fmt: skip
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    transformers.LlavaNextProcessor(
        images, tokens, patch_size=vision["patch_size"],
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(base)  # fmt: skip
    ours = export(place, base, "llava-export")
    tolerances.assert_near(
        run_block(place, 0), ours.embed(images=[place / "photos" / "0.png"]), 1e-4
    )


def test_phi_in_transformers(place):
    ours = export(place, tiny.backbone("phi35v"), "phi-text", "--text-only")
    path = place / "phi-text" / "config.json"  # the default of transformers is a token out of range
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": None}))
    tolerances.assert_near(run_block(place, 1), ours.embed(texts=["a puppy"]), 1e-4)


@pytest.mark.slow
def test_smol_in_sentence_transformers(place):
    pytest.importorskip("sentence_transformers")
    ours = export(place, place / "model", "smol-text", "--text-only")
    tolerances.assert_near(run_block(place, 2), ours.embed(texts=["a puppy", "a young dog"]), 1e-4)
