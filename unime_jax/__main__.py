"""Lists what can be run."""

import ast
import difflib
import pathlib

from unime_jax import runtime
from unime_jax.types import UserError

ENTRIES = (
    "prepare",
    "teach",
    "train",
    "evaluate",
    "embed",
    "inspect",
    "convert",
    "plan",
    "ablate",
)


def main(argv: list[str]) -> None:
    for word in argv[1:2]:
        if word in ENTRIES:
            raise UserError(f"{word} is a program of its own: python -m unime_jax.{word}")
        if word not in ("-h", "--help"):
            near = difflib.get_close_matches(word, ENTRIES, 1)
            hint = f"did you mean python -m unime_jax.{near[0]}" if near else "see --help"
            raise UserError(f"{word}: no such program; {hint}")
    print("UniME in JAX. Each of these tells more with --help:\n")
    for name in ENTRIES:
        print(f"  python -m unime_jax.{name:<9} {_first_line(name)}")


def _first_line(name: str) -> str:
    """Returns what a module says of itself; it is not imported, for that takes seconds."""
    text = pathlib.Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


if __name__ == "__main__":
    runtime.run_entry(main)
