"""Path selection, schedules and the optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unime_jax import optim
from unime_jax.types import UserError, flatten, unflatten

FLAT = {
    "language_model/layers/q_proj/kernel": jnp.ones((2, 3, 3)),
    "language_model/layers/q_proj/lora_A": jnp.ones((2, 3, 1)),
    "multi_modal_projector/linear_1/kernel": jnp.ones((3, 3)),
    "multi_modal_projector/linear_1/bias": jnp.ones((3,)),
}


def test_flatten_and_back():
    assert flatten(unflatten(FLAT)).keys() == FLAT.keys()
    assert flatten({"a": {"b": 1, "c": None}}) == {"a/b": 1}


def test_trainable_parameters_are_those_that_match_a_rule():
    trainable, frozen = optim.split_trainable(FLAT, [optim.ADAPTER_PATTERN, "^multi_modal"])
    assert sorted(trainable) == sorted(FLAT)[1:]
    assert list(frozen) == ["language_model/layers/q_proj/kernel"]


def test_a_rule_without_a_parameter_is_refused():
    with pytest.raises(UserError, match="no_such"):
        optim.split_trainable(FLAT, ["no_such"])


@pytest.mark.parametrize("kind, last", [("linear", 0.1), ("cosine", 0.024472), ("constant", 1.0)])
def test_schedule_warms_up_and_decays(kind, last):
    schedule = optim.learning_rate_schedule(peak=1.0, kind=kind, warmup_steps=4, steps=14)
    np.testing.assert_allclose([schedule(i) for i in range(5)], [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(schedule(13), last, rtol=1e-4)


def test_one_step_is_adam_with_clipping_and_multipliers():
    optimizer = optim.make_optimizer(
        optax.constant_schedule(0.5), clip_norm=1.0, multipliers=(("^multi_modal", 0.1),)
    )
    grads = {path: jnp.full_like(x, 3.0) for path, x in FLAT.items()}
    updates, _ = optimizer.update(grads, optimizer.init(FLAT), FLAT)
    # The first Adam step is -lr * sign, whatever the gradient's size.
    np.testing.assert_allclose(updates["language_model/layers/q_proj/lora_A"], -0.5, rtol=1e-4)
    np.testing.assert_allclose(updates["multi_modal_projector/linear_1/bias"], -0.05, rtol=1e-4)


def test_weight_decay_spares_vectors():
    optimizer = optim.make_optimizer(optax.constant_schedule(1.0), weight_decay=0.1)
    grads = {path: jnp.zeros_like(x) for path, x in FLAT.items()}
    updates, _ = optimizer.update(grads, optimizer.init(FLAT), FLAT)
    np.testing.assert_allclose(updates["multi_modal_projector/linear_1/kernel"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["multi_modal_projector/linear_1/bias"], 0.0)


def test_global_norm():
    np.testing.assert_allclose(optim.global_norm({"a": jnp.ones(9), "b": jnp.full(1, 4.0)}), 5.0)


def test_an_update_at_a_spike_of_the_loss_is_skipped():
    """Window 4, factor 3: the guard acts from the fifth loss on."""
    inner = optim.make_optimizer(optax.constant_schedule(0.5))
    guard = optim.skip_spikes(inner, factor=3.0, window=4)
    params = {"kernel": jnp.ones((2, 2))}
    state, plain = guard.init(params), inner.init(params)
    losses = [9.0, 1.0, 1.0, 1.2, 3.4, 3.2, 1.0, 30.0, 30.0, 30.0]
    skips = [False, False, False, False, True, False, False, True, True, False]
    for number, (loss, skip) in enumerate(zip(losses, skips, strict=True)):
        grads = {"kernel": jnp.full((2, 2), number + 1.0)}
        updates, state = guard.update(grads, state, params, loss=jnp.float32(loss))
        if skip:
            assert not np.any(updates["kernel"]), number
        else:
            expected, plain = inner.update(grads, plain, params)
            np.testing.assert_array_equal(updates["kernel"], expected["kernel"], str(number))
        for one, other in zip(jax.tree.leaves(state.inner), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(one, other)
    assert int(optim.skipped_updates(state)) == sum(skips)
    assert optim.skipped_updates(plain) is None
    early = guard.init(params)
    for loss in (1.0, 1.0, 1.0, 50.0):
        _, early = guard.update(grads, early, params, loss=jnp.float32(loss))
    assert int(early.skipped) == 0, "not before there are so many losses"
    none = guard.init(params)
    for loss in (0.0, 0.0, 0.0, 0.0, 1e-6, 0.0):  # every row is learned: the median is 0
        _, none = guard.update(grads, none, params, loss=jnp.float32(loss))
    assert int(none.skipped) == 0
