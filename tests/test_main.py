"""What `python -m unime_jax` says, and how command lines that are wrong end."""

import pathlib

import pytest

from unime_jax import __main__, arguments
from unime_jax.types import UserError

PACKAGE = pathlib.Path(__main__.__file__).parent


def test_every_program_is_listed_with_what_it_does(capsys):
    __main__.main(["unime_jax"])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  python -m")]
    ends = "runtime.run_entry(main)\n"
    programs = {path.stem for path in PACKAGE.glob("*.py") if path.read_text().endswith(ends)}
    assert {line.split()[2].removeprefix("unime_jax.") for line in lines} == programs - {"__main__"}
    assert all(line.endswith(".") and len(line.split()) > 4 for line in lines)
    with pytest.raises(UserError, match="python -m unime_jax.embed"):
        __main__.main(["unime_jax", "embed", "--model", "x"])
    __main__.main(["unime_jax", "--help"])
    assert [x for x in capsys.readouterr().out.splitlines() if x.startswith("  p")] == lines


@pytest.mark.parametrize(
    "word, said",
    [
        ("evalute", "^evalute: no such program; did you mean python -m unime_jax.evaluate$"),
        ("--nope", "^--nope: no such program; see --help$"),
    ],
)
def test_a_program_that_is_not_there(word, said):
    with pytest.raises(UserError, match=said):
        __main__.main(["unime_jax", word])


def test_a_wrong_command_line_is_one_line():
    parser = arguments.Parser(prog="python -m x")
    parser.add_argument("--model", required=True)
    for line in ([], ["--model"], ["--model", "a", "--nope"]):
        with pytest.raises(UserError, match="model|nope.*; `python -m x --help` lists the flags$"):
            parser.parse_args(line)
