"""Config files, overrides and the checks before any work: one clear line for each fault."""

import pathlib
import re

import pytest

from unime_jax import config as config_lib
from unime_jax import config_values
from unime_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
STAGE1 = str(ROOT / "configs" / "smol_stage1.py")


def parse(*overrides, file=STAGE1):
    return config_lib.parse(["train", f"--config={file}", *overrides], "doc")


@pytest.fixture
def runnable(tmp_path):
    c = config_lib.base_config()
    c.output = str(tmp_path / "run")
    c.model.path = c.data.path = c.teacher.vectors = str(tmp_path)
    return c


def test_overrides_reach_their_key_with_its_type():
    c = parse("--config.train.steps=7", "--config.optim.learning_rate=1e-2")
    assert c.train.steps == 7 and isinstance(c.train.steps, int)
    assert c.optim.learning_rate == 0.01


@pytest.mark.parametrize(
    "given, sets",
    [
        ("A,B", ("A", "B")),
        (" A, B,", ("A", "B")),
        ("B,A,B", ("B", "A")),
        ("('A', 'B,C')", ("A", "B", "C")),
        ("", ()),
    ],
)
def test_sets_are_named_with_commas(given, sets):
    c = parse(f"--config.data.sets={given}")
    config_lib.validate_values(c)
    assert c.data.sets == sets


def test_two_word_flag_and_config_argument():
    c = config_lib.parse(["train", "--config", f"{STAGE1}:smoke", "--config.seed", "3"], "doc")
    assert c.seed == 3 and c.train.steps < 10


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--config.train.stepz=7"], r"^config\.train\.stepz: no such key; did you mean steps\?$"),
        (["--config.traim.steps=7"], r"^config\.traim\.steps: no such key; did you mean train\?$"),
        (["--config.nope=1"], r"^config\.nope: no such key$"),
        (["--config.train.steps.x=1"], r"train\.steps\.x"),
        (["--config.train.steps='1e3"], r"--config\.train\.steps='1e3: .*\"'1e3\"$"),
        (["--config.train.steps=many"], r"--config\.train\.steps=many: .*'many'$"),
        (["--confg.train.steps=7"], "confg"),
        (["--config.nothing.here=1"], "nothing"),
        (["stray"], "stray"),
    ],
)
def test_a_typo_is_one_line_that_names_it(arguments, named):
    with pytest.raises(UserError, match=named) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


def test_a_file_that_asks_for_a_key_that_is_not_there_is_told(tmp_path):
    text = "from unime_jax.config import base_config\ndef get_config(arg=''):\n    "
    (tmp_path / "c.py").write_text(text + "return base_config().train.stepz\n")
    with pytest.raises(UserError, match=r"^config: stepz: no such key; did you mean steps\?$"):
        parse(file=tmp_path / "c.py")


@pytest.mark.parametrize(
    "body, said",
    [
        ("c.model.path.foo = 1", "AttributeError: 'str' object has no attribute 'foo'.*"),
        ("None.copy()", "AttributeError: 'NoneType' object has no attribute 'copy'"),
        ("{'smoke': 3}['smoek']", "KeyError: 'smoek'"),
        ("raise KeyError()", "KeyError"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("c.los = 3", r"los: no such key; did you mean loss\?"),
        ("c.train.lerning_rate = 3", "lerning_rate: no such key"),
        ("config.evaluation_config().lmit = 3", r"lmit: no such key; did you mean limit\?"),
        ("c.train.steps = 'x'", "TypeError: Could not override field 'steps' .*"),
        ("open('/no/file')", "FileNotFoundError: .* No such file or directory: '/no/file'"),
        ("import nonono", "ModuleNotFoundError: No module named 'nonono'"),
    ],
)
def test_what_a_config_file_fails_at_is_told_with_its_line(tmp_path, body, said):
    file = tmp_path / "c.py"
    text = "from unime_jax import config\ndef get_config(arg=''):\n    "
    file.write_text(f"{text}c = config.base_config()\n    {body}\n    return c\n")
    with pytest.raises(UserError, match=rf"^config: {said} \({re.escape(str(file))}:4\)$"):
        parse(file=file)


@pytest.mark.parametrize(
    "body, said",
    [
        ("c.optim = {'learning_rate': 1e-3}", r"config\.optim lacks b1, .* and 5 more: set keys "
         r"one by one \(--config\.optim\.learning_rate=VALUE; in a file c\.optim\.learning_rate"),
        ("c.train.adapters = ConfigDict({'rank': 8})", r"config\.train\.adapters lacks alpha, "),
        ("c.model = {'path': 'x'}", r"config\.model lacks attention, dtype, remat: set"),
        ("c.log = ConfigDict()", r"config\.log lacks every_steps, .*\.log\.every_steps=VALUE"),
        ("c = ConfigDict({'stage': 'align'})", r"config lacks checkpoint, .*8 more: .*c\.stage = "),
        ("c = ConfigDict(c.to_dict()); c.lr = 3", r"config\.lr: no such key$"),
        ("c = ConfigDict(c.to_dict()); c.optim.learning_rat = 3",
         r"config\.optim\.learning_rat: .* mean config\.optim\.learning_rate\?$"),
        ("c = ConfigDict({**c.to_dict(), 'loss': 3})", r"config\.loss=3: is a section"),
        ("c.optim = ConfigDict({**c.optim.to_dict(), 'learning_rate': '1'})",
         r"config\.optim\.learning_rate='1': give a number$"),
        ("c.train.steps = None", r"config\.train\.steps=None: give an integer$"),
        ("c.train.chunk = None", r"config\.train\.chunk=None: give an integer$"),
        ("c.train.adapters.targets = None", r"config\.train\.adapters\.targets=None: .* string$"),
        ("c.data.sets = None", r"config\.data\.sets=None: give a list$"),
        ("c.loss.kl_diagonal = None", r"config\.loss\.kl_diagonal=None: give True or False$"),
        ("c.data.directions = ()", r"config\.data\.directions is empty; name one or both$"),
    ],
)  # fmt: skip
def test_keys_that_are_missing_new_or_none_are_named(tmp_path, body, said):
    file = tmp_path / "c.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "from unime_jax.config import base_config\n"
        f"def get_config(arg=''):\n    c = base_config()\n    {body}\n    return c\n"
    )
    with pytest.raises(UserError, match=f"^{said}"):
        config_lib.validate_values(parse(file=file))


def test_a_section_replaced_by_a_flag_is_named():
    with pytest.raises(UserError, match=r"^config\.loss lacks kl_diagonal, .* and 2 more: "):
        config_lib.validate_values(parse("--config.loss={'k': 3}"))


@pytest.mark.parametrize("key", ["loss.k", "model.path"])
def test_a_key_without_a_value_is_named(key):
    with pytest.raises(UserError, match=rf"^--config\.{key} needs a value, as in --config\.{key}="):
        parse(f"--config.{key}", "--config.seed=3")
    assert parse("--config.log.tensorboard", "--config.seed=3").seed == 3


@pytest.mark.parametrize("words", [["--config="], ["--config", ""], ["--config", str(ROOT)]])
def test_what_is_no_config_file_is_named(words):
    with pytest.raises(
        UserError, match=f"^--config={words[-1].removeprefix('--config=')}: give a file; "
    ):
        config_lib.parse(["train", *words], "doc")


def test_a_config_file_that_is_no_python(tmp_path):
    (tmp_path / "c.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match=r"^config: invalid syntax \(c.py, line 1\)$"):
        parse(file=tmp_path / "c.py")


@pytest.mark.parametrize(
    "text, said",
    [
        ("def get_config(a, b): pass", "TypeError: get_config.* missing 2 required .* 'a' and 'b'"),
        ("def get_config(): return 1", "get_config returns int, not a ConfigDict"),
        ("from ml_collections import FrozenConfigDict\ndef get_config():\n"
         "    return FrozenConfigDict()", "get_config returns a FrozenConfigDict, not .*"),
        ("def get_config(): pass", "get_config returns NoneType, not a ConfigDict"),
    ],
)  # fmt: skip
def test_a_config_file_that_returns_none_is_named(tmp_path, text, said):
    file = tmp_path / "c.py"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"^config: {said} \({re.escape(str(file))}\)$"):
        parse(file=file)


@pytest.mark.parametrize(
    "found, said",
    [
        ({"a": 1, "b": {"c": 2}, "d": {}}, ""),
        ({"a": 1, "b": {"c": 2}, "d": {"any": 3}}, ""),
        ({"a": 1, "b": {"c": 2}, "d": {}, "limt": 1}, "config.limt: no such key"),
        ({"a": 1, "b": {"cc": 2}, "d": {}}, "config.b.cc: no such key; did you mean config.b.c?"),
        ({"a": 1, "b": {}, "d": {}}, "config.b.c is missing"),
        ({"a": 1, "b": {"c": 2}}, "config.d is missing"),
        ({"a": 1, "b": {"c": None}, "d": {}}, "config.b.c=None: give a value"),
        ({"a": 1, "b": {"c": 2}, "d": {"x": None}}, 'config.d.x=None: give "" to leave it out'),
    ],
)
def test_keys_of_a_config_that_is_whole_in_itself(found, said):
    assert config_values.misnamed(found, ("a", "b.c", "d"), ("d.",)) == said


def test_none_for_nothing_is_nothing(tmp_path):
    """As configurations of before have it."""
    text = (
        "from unime_jax.config import base_config\ndef get_config(arg=''):\n    c = base_config()\n"
    )
    text += (
        "    c.init_from = c.data.images = c.data.features = c.teacher.path = None\n    return c\n"
    )
    (tmp_path / "c.py").write_text(text)
    config = parse("--config.output=x", file=tmp_path / "c.py")
    config_lib.validate_values(config)
    assert (
        config.init_from == config.data.images == config.data.features == config.teacher.path == ""
    )


def test_missing_config_file_is_named():
    with pytest.raises(UserError, match="absent.py"):
        parse(file="absent.py")


def test_a_variant_that_the_file_does_not_have_is_named():
    for words in (["--config", f"{STAGE1}:smoek"], [f"--config={STAGE1}:smoek"]):
        with pytest.raises(UserError, match=r"stage1.py:smoek: no such variant"):
            config_lib.parse(["train", *words, "--config.train.steps=7"], "doc")


def test_a_variant_may_be_overridden_until_nothing_is_left_of_it(tmp_path):
    (tmp_path / "c.py").write_text(
        "from unime_jax.config import base_config\n"
        "def get_config(arg=''):\n"
        "    c = base_config()\n"
        "    c.seed = 1 if arg else 0\n"
        "    return c\n"
    )
    words = ["train", f"--config={tmp_path}/c.py:other", "--config.seed", "0"]
    assert config_lib.parse(words, "doc").seed == 0


def test_no_config_file():
    with pytest.raises(UserError, match="--config FILE"):
        config_lib.parse(["train", "--"], "doc")


def test_help_prints_the_documentation(capsys):
    with pytest.raises(SystemExit) as caught:
        config_lib.parse(["train", "--help"], "how to train")
    assert caught.value.code == 0 and "how to train" in capsys.readouterr().out


def test_a_sound_config_passes(runnable):
    config_lib.validate_train(runnable)


@pytest.mark.parametrize(
    "key, value",
    [
        ("stage", "distil"),
        ("loss.k", 1024),
        ("loss.k", -1),
        ("loss.temperature", 0.0),
        ("loss.negatives", "harder"),
        ("train.chunk", 100),
        ("train.chunk", 2048),
        ("train.steps", 0),
        ("train.batch_size", 1),
        ("train.adapters.rank", 0),
        ("train.adapters.dropout", 1.0),
        ("model.path", "/no/such/place"),
        ("data.path", ""),
        ("data.image_size", -1),
        ("data.length_bins", 9),
        ("data.length_bins", 0),
        ("data.image_crops", -4),
        ("data.directions", ("sideways",)),
        ("output", ""),
        ("checkpoint.keep", 0),
    ],
)
def test_impossible_values_name_their_key(runnable, key, value):
    node = runnable
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    with pytest.raises(UserError, match=leaf) as caught:
        config_lib.validate_train(runnable)
    assert "\n" not in str(caught.value)


def test_every_config_of_the_repository_parses():
    for path in sorted((ROOT / "configs").glob("*.py")):
        for argument in ("", ":smoke"):
            parse(file=f"{path}{argument}")


def test_the_description_names_every_key(runnable):
    text = config_lib.describe(runnable)
    assert "loss" in text and "temperature=0.02" in text and "adapters.rank=16" in text
    assert len(text.splitlines()) == 1 + sum(1 for v in runnable.values() if hasattr(v, "keys"))
