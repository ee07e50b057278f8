"""A step taken again: the same numbers, and the rows and parameters that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_loop
import toy
from flax import nnx

from unime_jax import checkpoint, loop, optim, replay, sharding, steps
from unime_jax.config import base_config
from unime_jax.types import UserError, flatten

BAD = 2  # a token


class Trap(toy.ToyModel):
    """Rows with the token have a finite embedding, whose gradient is none: 0 times infinity."""

    def embed(self, inputs, *, key=None):
        out = super().embed(inputs, key=key)
        caught = (inputs.tokens == BAD).any(1)
        size = jnp.where(caught, 0.0, 1.0) * jnp.sum(self.kernel[...] ** 2)
        return out + (0 * jnp.where(caught, jnp.sqrt(size), 0.0))[:, None]


class Data(test_loop.Data):
    sets = ()

    def rows_of(self, step):
        return [{"set": "toy", "row": 100 * step + place} for place in range(16)]


def parts(directory, model, replayed=0):
    settings = base_config().to_dict()
    settings["output"] = str(directory)
    settings["loss"] |= {"temperature": 0.1, "k": 4}
    settings["log"] |= {"tensorboard": False}
    settings["train"]["adapters"]["rank"] = 0
    settings["train"]["replay"] = replayed
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    graphdef, state = nnx.split(model)
    trainable, frozen = optim.split_trainable(flatten(nnx.to_pure_dict(state)), ["kernel"])
    optimizer, step = steps.from_settings(settings, graphdef, steps=6, mesh=mesh)
    state = steps.create_state(jax.tree.map(jnp.copy, trainable), optimizer, mesh=mesh)
    return settings, graphdef, step, frozen, Data(), state, mesh


def rows_with_the_token(step, side):
    batch = toy.batch(seed=step)
    groups, order = getattr(batch, side), getattr(batch, f"{side}_order")
    has = np.concatenate([(group.tokens == BAD).any(1) for group in groups])
    return np.flatnonzero(has[order]).tolist()


def test_a_step_of_a_run_is_what_it_was_and_the_run_stays_as_it_is(tmp_path, capsys):
    settings, _, step, frozen, data, state, mesh = parts(tmp_path, toy.ToyModel(rngs=nnx.Rngs(0)))
    checkpoint.open_run(tmp_path, settings)
    saves = checkpoint.Checkpoints(tmp_path, config=settings, keep=9, every_steps=2)
    loop.Loop(settings, step, frozen, data, saves, None, mesh).run(state)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    found = replay.run(*parts(tmp_path, toy.ToyModel(rngs=nnx.Rngs(0)), replayed=4))
    said = capsys.readouterr().out
    assert "replaying step 4 from the state after step 2" in said
    assert "the gradients of all parameters are finite" in said and "'row': 30" in said
    logged = test_loop.report.read_metrics(tmp_path)[3]
    assert found["loss"] == logged["loss"] and found["gradient_norm"] == logged["gradient_norm"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(UserError, match="replay=7: the run has 6 steps"):
        replay.run(*parts(tmp_path, toy.ToyModel(rngs=nnx.Rngs(0)), replayed=7))


def test_rows_whose_embedding_is_not_finite_are_named(tmp_path, capsys):
    model = toy.ToyModel(rngs=nnx.Rngs(0))
    model.embedding[...] = model.embedding[...].at[BAD].set(jnp.nan)
    replay.run(*parts(tmp_path, model, replayed=1))
    said = capsys.readouterr().out
    for side in ("query", "target"):
        rows = rows_with_the_token(0, side)
        assert 0 < len(rows) <= 5
        assert f"{side}: embedding is not finite in {len(rows)} of 16 rows" in said
        for row in rows:
            assert f"  row {row}: {{'set': 'toy', 'row': {row}}}" in said
    assert "not finite: 1 of 1 parameters: kernel" in said


def test_rows_whose_gradient_alone_is_not_finite_are_named(tmp_path, capsys):
    found = replay.run(*parts(tmp_path, Trap(rngs=nnx.Rngs(0)), replayed=1))
    said = capsys.readouterr().out
    assert np.isfinite(found["loss"]) and not np.isfinite(found["gradient_norm"])
    rows = {side: rows_with_the_token(0, side) for side in ("query", "target")}
    count = sum(map(len, rows.values()))
    assert f"rows whose own gradient is not finite: {count}" in said
    assert f"query: row {rows['query'][0]}: " in said
