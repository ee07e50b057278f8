"""mteb's tasks on our models: its scores are those of our own metrics."""

import importlib.util
import logging

import miniature
import numpy as np
import pytest
from PIL import Image
from tolerances import EMBEDDING, assert_near

import unime_jax
from unime_jax import metrics
from unime_jax.types import UserError

# mteb takes seconds to import: by the tests, for every worker of a run collects them.
if importlib.util.find_spec("mteb") is None:
    pytest.skip("needs the extra mteb", allow_module_level=True)

WORDS = "cat dog fox owl bee cow pig rat hen ant bat elk".split()
CORPUS = [f"a {word} in the {WORDS[-i]}" for i, word in enumerate(WORDS, 1)]
QUERIES = [f"find {word}" for word in WORDS[:8]]
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 3))
IMAGES = [Image.new("RGB", (40, 30), tuple(map(int, colour))) for colour in COLOURS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("mteb")
    return unime_jax.load(miniature.write_all(root) / "student", dtype="float32")


def encoder_of(model, **options):
    from unime_jax.integrations.mteb import MTEBEncoder

    return MTEBEncoder(model, **options)


def metadata(name: str, kind: str, category: str, modalities: list[str], score: str, **rest):
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name, type=kind, category=category, modalities=modalities, main_score=score,
        description="made up", reference=None, eval_splits=["test"], eval_langs=["eng-Latn"],
        dataset={"path": "none", "revision": "1"}, date=None, domains=None, task_subtypes=None,
        license=None, annotations_creators=None, dialect=None, sample_creation=None,
        bibtex_citation=None, **rest,
    )  # fmt: skip


def retrieval(name: str, category: str, modalities: list[str], queries: dict, corpus: dict):
    """A task whose query i looks for document i."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Task(AbsTaskRetrieval):
        def load_data(self, **_):
            count = len(next(iter(queries.values())))
            split = {
                "queries": Dataset.from_dict({"id": [f"q{i}" for i in range(count)], **queries}),
                "corpus": Dataset.from_dict({"id": [f"d{i}" for i in range(12)], **corpus}),
                "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(count)},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    kind = "Retrieval" if modalities == ["text"] else "Any2AnyRetrieval"
    rest = {"prompt": {"query": "Find the animal."}}
    Task.metadata = metadata(name, kind, category, modalities, "recall_at_5", **rest)
    return Task()


def scores(task, encoder) -> dict[str, float]:
    import mteb

    found = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False)
    return found.task_results[0].scores["test"][0]


def assert_same_recall(found: dict, queries: np.ndarray, corpus: np.ndarray) -> None:
    expected = metrics.recall_at_k(queries @ corpus.T, np.arange(len(queries)), (1, 3, 5))
    for k, value in expected.items():
        assert found[f"recall_at_{k}"] == pytest.approx(value, abs=1e-5)
    assert 0 < expected[5] < 1


def test_text_retrieval_with_the_tasks_instruction(model):
    task = retrieval("Text", "t2t", ["text"], {"text": QUERIES}, {"text": CORPUS})
    found = scores(task, encoder_of(model, instructions=True))
    queries = model.embed(texts=QUERIES, instruction="Find the animal.")
    assert_same_recall(found, queries, model.embed(texts=CORPUS))


def test_pictures_and_interleaved_documents(model):
    task = retrieval(
        "Interleaved", "i2it", ["image", "text"], {"image": IMAGES[:8]},
        {"image": IMAGES[::-1], "text": CORPUS[:-1] + [""]},
    )  # fmt: skip
    queries = model.embed(images=IMAGES[:8])
    for fusion in ("together", "sum"):
        corpus = model.embed([*CORPUS[:-1], None], IMAGES[::-1], fusion=fusion)
        expected = metrics.recall_at_k(queries @ corpus.T, np.arange(8), (1, 3, 5))
        found = scores(task, encoder_of(model, fusion=fusion))
        for k, value in expected.items():
            assert found[f"recall_at_{k}"] == pytest.approx(value, abs=1e-5)


def test_similarity_of_sentences(model):
    from datasets import Dataset
    from mteb.abstasks.sts import AbsTaskSTS

    gold = np.random.default_rng(0).uniform(0, 5, 12)

    class Task(AbsTaskSTS):
        metadata = metadata("Similar", "STS", "t2t", ["text"], "cosine_spearman")
        min_score, max_score = 0, 5

        def load_data(self, **_):
            rows = {"sentence1": CORPUS, "sentence2": CORPUS[::-1], "score": gold}
            self.dataset = {"test": Dataset.from_dict(rows)}
            self.data_loaded = True

    vectors = model.embed(texts=CORPUS)
    expected = metrics.spearman((vectors * vectors[::-1]).sum(axis=1), gold)
    assert scores(Task(), encoder_of(model))["cosine_spearman"] == pytest.approx(expected, abs=1e-5)


def test_instructions_by_task_type_and_side(model):
    from mteb.types import PromptType

    task = retrieval("Text", "t2t", ["text"], {"text": QUERIES}, {"text": CORPUS}).metadata
    query, document = PromptType.query, PromptType.document
    assert encoder_of(model).instruction_of(task, query) is None
    asked = encoder_of(model, instructions=True)
    assert asked.instruction_of(task, query) == "Find the animal."
    assert asked.instruction_of(task, document) is None
    prompts = {"Retrieval-query": "Search.", "document": "A page.", "STS": ""}
    given = encoder_of(model, prompts=prompts, instructions=True)
    assert given.instruction_of(task, query) == "Search."
    assert given.instruction_of(task, document) == "A page."
    plain = metadata("Plain", "Retrieval", "t2t", ["text"], "recall_at_5", prompt="Find it.")
    assert asked.instruction_of(plain, query) == "Find it."
    assert asked.instruction_of(plain, document) is None
    sts = metadata("Similar", "STS", "t2t", ["text"], "cosine_spearman")
    assert given.instruction_of(sts, None) is None
    assert asked.instruction_of(sts, None)
    with pytest.raises(KeyError, match="Retreival"):
        encoder_of(model, prompts={"Retreival": "a typo"})


def encode(encoder, batches):
    task = metadata("Faulty", "STS", "t2t", ["text"], "cosine_spearman")
    return encoder.encode(batches, task_metadata=task, hf_split="test", hf_subset="default")


def test_rows_that_cannot_be_embedded_become_zeros(model, caplog, monkeypatch):
    encoder = encoder_of(model)
    texts = ["a cat", " ", "a dog", "an owl"]
    with caplog.at_level(logging.WARNING, logger="unime_jax"):
        vectors = encode(encoder, [{"text": texts}])
    assert_near(vectors[[0, 2, 3]], model.embed(texts=[texts[i] for i in (0, 2, 3)]), EMBEDDING)
    assert not vectors[1].any() and "1 of 4 rows" in caplog.text and "row 1 is empty" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="unime_jax"):
        vectors = encode(encoder, [{"image": [IMAGES[0], b"no picture", IMAGES[1]]}])
    assert_near(vectors[[0, 2]], model.embed(images=IMAGES[:2]), EMBEDDING)
    assert not vectors[1].any() and "row 1" in caplog.text
    with pytest.raises(UserError, match="no row can be embedded; row 0"):
        encode(encoder, [{"text": ["", ""]}])
    with pytest.raises(UserError, match="asks for audio"):
        encode(encoder, [{"audio": [1]}])
    assert encode(encoder, []).shape == (0, 32)
    vectors = np.where(np.arange(2)[:, None] == 1, np.nan, np.ones((2, 32), np.float32))
    monkeypatch.setattr(model, "embed", lambda *_, **__: vectors)
    found = encode(encoder, [{"text": ["a", "b"]}])
    assert found[0].all() and not found[1].any() and "row 1: the model gave no fin" in caplog.text


def test_the_model_tells_mteb_what_it_is(tmp_path):
    directory = miniature.write_all(tmp_path) / "teacher"
    encoder = encoder_of(directory)
    meta = encoder.mteb_model_meta
    assert meta.name == "unime_jax/teacher" and len(meta.revision) == 16
    assert meta.modalities == ["text"] and meta.embed_dim == 16
    vectors = encode(encoder, [{"text": ["a cat"]}])
    assert_near(np.linalg.norm(vectors, axis=1), [1.0], 1e-6)
