"""A model, rows to embed with it, and what they are alone."""

import json

import miniature
import pytest
from embedding_run import COUNT, FAULTS

import unime_jax
from unime_jax import embedder, runtime


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A model, and 40 good rows with four bad ones among them."""
    root = miniature.write_all(tmp_path_factory.mktemp("embed"))
    lines, folder = [], root / "pairs"
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    for i in range(COUNT):
        row = {"id": f"n{i}"}
        if i % 3 != 1:
            row["text"] = f"a cat, {'and a dog ' * (i % 4)}{i}"
        if i % 3 != 0:
            row["image"] = f"{i}.png"
        lines.append(json.dumps(row))
    for place, fault in zip((3, 17, 18, 43), FAULTS, strict=True):
        lines.insert(place, fault)
    (folder / "items.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="session")
def alone(root):
    """What the good rows are, embedded in one call on one device."""
    rows = [json.loads(line) for line in (root / "pairs" / "items.jsonl").read_text().split("\n")
            if line not in FAULTS]  # fmt: skip
    images = [root / "pairs" / row["image"] if "image" in row else None for row in rows]
    model = unime_jax.load(root / "student", dtype="float32")
    return model.embed(texts=[row.get("text") for row in rows], images=images)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Compiles nothing twice, and leaves the compile cache of the tests alone."""
    monkeypatch.setattr(runtime, "start", lambda: None)
    monkeypatch.setattr(embedder, "load_weights", _load)


_loaded, _load_weights = {}, embedder.load_weights


def _load(found, **options):
    key = found.fingerprint, str(options)
    if key not in _loaded:
        _loaded[key] = _load_weights(found, **options)
    return _loaded[key]
