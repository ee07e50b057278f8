"""What was wrong with a config file or an override, in one line."""

import itertools
import os
import re
import traceback
from collections.abc import Iterator

from unime_jax.types import UserError

_LOCKED = r'Key "(\w+)" does not exist and cannot be added.*?(?:Did you mean "(\w+)".*)?'


def explain(error: BaseException, argv: list[str]) -> str:
    """Turns what absl, importlib or ml_collections raised into one line."""
    file = _file(argv)
    error, line = _origin(error, file)
    message = error.args[0] if error.args else ""
    message = str(message.args[0] if isinstance(message, KeyError) else message)
    if line and (found := re.fullmatch(_LOCKED, message.strip(), re.S)):
        missing, near = found.groups()
        hint = f"; did you mean {near}?" if near else ""
        return f"config: {missing}: no such key{hint} ({file}:{line})"
    if found := re.fullmatch(r"'(\w+)'(?:\s+Did you mean \"(\w+)\".*)?", message.strip(), re.S):
        missing, near = found.groups()
        keys = (word.removeprefix("--").partition("=")[0] for word in argv)
        named = next((key for key in keys if missing in key.split(".")), f"config: {missing}")
        return f"{named}: no such key" + (f"; did you mean {near}?" if near else "")
    kind = type(error).__name__
    if line:
        text = " ".join(str(error).split())
        return f"config: {kind}{f': {text}' if text else ''} ({file}:{line})"
    text = str(error if isinstance(error, SyntaxError) else message)
    for word, following in _without_value(argv):
        if f"{word}={following}" in text:
            return f"{word} needs a value, as in {word}=VALUE"
    if "FrozenConfigDict" in text:
        return f"config: get_config returns a FrozenConfigDict, not a ConfigDict ({file})"
    if not file or "Is a directory" in text:
        return f"--config={file}: give a file; configs/ has one per run"
    if "Traceback (most" in text:  # of calling get_config, with what it is called with
        text = f"{text.strip().splitlines()[-1]} ({file})"
    text = " ".join(text.split())
    if isinstance(error, FileNotFoundError) or "No such file" in text:
        return f"config file {file} not found; configs/ has one file per run"
    return f"config: {text or kind}"


def refuse(config, argv: list[str]) -> None:
    """Raises `UserError`: what a config file returned is no configuration."""
    kind = type(config).__name__
    raise UserError(f"config: get_config returns {kind}, not a ConfigDict ({_file(argv)})")


def check_swallowed(config, argv: list[str]) -> None:
    """Raises `UserError` where a key without a value took the next flag for it."""
    for word, following in _without_value(argv):
        value = config
        for part in word.split(".")[1:]:
            value = value[part]
        if value == following:
            raise UserError(f"{word} needs a value, as in {word}=VALUE")


def _without_value(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Yields keys that a flag follows, not a value; those of True and False need none."""
    for word, following in itertools.pairwise(argv):
        if re.fullmatch(r"--config\.[\w.]+", word) and following.startswith("--"):
            yield word, following


def _file(argv: list[str]) -> str:
    for word, following in itertools.pairwise([*argv, ""]):
        if found := re.fullmatch(r"--?config(?:=(.*))?", word):
            return (following if found[1] is None else found[1]).split(":")[0]
    return "--config"


def _origin(error: BaseException, file: str) -> tuple[BaseException, int]:
    """Returns what was raised first in a config file, and its line there; the error and 0 if none.

    ml_collections raises errors of its own in place of some, and puts a traceback into their text.
    """
    found, place, each = error, 0, error
    while each is not None:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(each.__traceback__)
            if os.path.realpath(frame.filename) == os.path.realpath(file)
        ]
        if lines:
            found, place = each, lines[-1]
        each = each.__cause__ or each.__context__
    return found, place
