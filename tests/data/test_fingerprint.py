"""What a run's rows are: changes under the same path are noticed."""

import json

import pytest

from unime_jax import checkpoint
from unime_jax.data import fingerprint, text_sources
from unime_jax.types import UserError

TEXTS = [f"row {number}" for number in range(5000)]


def digest(texts, name="sentences"):
    return fingerprint.fingerprint([text_sources.Texts(texts, name)])


def test_other_rows_other_order_and_other_numbers_are_noticed():
    few = TEXTS[:20]
    assert digest(few) == digest(list(few))
    assert digest(few)["sentences"]["rows"] == 20
    for changed in (few[:-1], few[::-1], [*few[:7], "another", *few[8:]]):
        assert digest(changed) != digest(few)
    # Of many rows some are looked at; a row that is missing moves those behind it.
    assert digest(TEXTS[:100] + TEXTS[101:] + ["new"]) != digest(TEXTS)


def test_sets_of_one_name_count_as_one():
    both = fingerprint.fingerprint(
        [text_sources.Texts(TEXTS[:3], "a"), text_sources.Texts(TEXTS[:4], "a")]
    )
    assert both["a"]["rows"] == 7


def test_a_run_keeps_its_data_and_names_the_set_that_changed(tmp_path):
    found = digest(TEXTS[:9], "a") | digest(TEXTS[:5], "b")
    checkpoint.check_data(tmp_path, digest(TEXTS[:8], "a"))  # nothing was trained on them
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "data.json").unlink()
    checkpoint.check_data(tmp_path, found)
    checkpoint.check_data(tmp_path, json.loads(json.dumps(found)))
    changed = found | digest(TEXTS[:4], "b")
    with pytest.raises(UserError, match=r"b: 5 rows \(\w+\) then, 4 rows \(\w+\) now") as caught:
        checkpoint.check_data(tmp_path, changed)
    assert "a: " not in str(caught.value)
    with pytest.raises(UserError, match="a: 9 rows .* then, none now"):
        checkpoint.check_data(tmp_path, digest(TEXTS[:5], "b"))
