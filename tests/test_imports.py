"""The import rules of the house: imports go down only, one door for each third party."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "unime_jax"

ENTRIES = {"train", "evaluate", "embed", "teach", "convert", "prepare", "plan", "inspect"}
ENTRIES |= {"ablate", "integrations", "__main__"}
STEP = {"chunks", "embedder", "steps", "losses", "metrics", "optim", "checkpoint", "report"}
STEP |= {"embed_job", "evaluation", "loop", "model_card", "planning", "search", "text_side"}
STEP |= {"ablation", "initial", "predictions", "replay", "tiny", "tower_features", "train_data"}
STEP |= {"runner", "train_checks", "weights"}
PARTS = {"models", "data", "benchmarks"}
GROUND = {"types", "sharding", "config", "config_errors", "config_values", "runtime", "cluster"}
GROUND |= {"allocator", "arguments", "failures", "file_hashes", "gpu_flags"}
LEVELS = {
    **dict.fromkeys(ENTRIES, 3),
    **dict.fromkeys(STEP, 2),
    **dict.fromkeys(PARTS, 1),
    **dict.fromkeys(GROUND, 0),
}

# Third party -> the modules (or packages) that may import it.
DOORS = {
    "torch": set(),
    "transformers": {"data"},
    "tokenizers": {"data"},
    "PIL": {"data"},
    "tensorflow_datasets": {"data"},
    "array_record": {"data"},
    "pyarrow": {"data"},
    "gguf": {"data"},
    "faiss": {"search"},
    "grain": {"data", "checkpoint"},
    "huggingface_hub": {"models"},
    "orbax": {"checkpoint"},
    "safetensors": {"models", "convert", "data"},
    "ml_collections": {"config"} | ENTRIES,
    "matplotlib": {"report"},
    "tensorboardX": {"report"},
    "mteb": {"integrations"},
    "tensorflow": set(),
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def unit(path: pathlib.Path) -> str:
    """The room a file belongs to: its top-level module or package inside unime_jax."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_and_third_parties_use_their_door(path):
    here = unit(path)
    for name, line in imported(path):
        top, *rest = name.split(".")
        place = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if top in DOORS:
            assert here in DOORS[top], f"{place}: its door is {sorted(DOORS[top]) or 'tests/'}"
        if top != "unime_jax" or here == "__init__" or not rest:
            continue
        there = rest[0]
        if there == here or there not in LEVELS:
            continue
        assert there not in ENTRIES, f"{place}: nobody imports an entry"
        assert LEVELS[there] <= LEVELS[here], f"{place}: imports go down only"
        assert {here, there} != {"models", "data"}, f"{place}: models and data are strangers"
        if LEVELS[here] == 1:
            assert LEVELS[there] == 0, f"{place}: parts import only the ground"


def test_every_module_has_a_level():
    known = set(LEVELS) | {"__init__"}
    assert {unit(path) for path in modules()} <= known


def loaded(imports: str, packages: list[str]) -> list[str]:
    """Returns which of the packages a fresh process has after these imports."""
    code = f"{imports}\nimport sys\nprint(*[m for m in {packages!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_training_loads_no_readers_of_data_before_it_reads_some():
    """They take a second, and training steps alone need none of them."""
    heavy = ["tensorflow_datasets", "grain", "array_record", "pyarrow", "transformers", "orbax"]
    imports = "import unime_jax.train, unime_jax.tiny, unime_jax.planning.composition"
    assert loaded(imports, heavy) == []


def test_importing_the_package_loads_nothing_heavy():
    heavy = ["torch", "tensorflow", "transformers", "grain", "orbax", "PIL", "matplotlib", "flax"]
    imports = "import jax, jax.numpy, unime_jax\nfrom unime_jax import losses"
    assert loaded(imports, heavy) == []
    assert loaded(imports, ["jax"]) == ["jax"]
