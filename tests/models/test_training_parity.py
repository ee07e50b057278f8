"""Five optimiser steps of stage 1 equal PyTorch's: transformers, peft and torch.optim.AdamW."""

import numpy as np
import parity
import peft
import pytest
import tiny_llava
import tolerances
import torch
from flax import nnx

from unime_jax import embedder, optim, steps
from unime_jax.types import Batch, flatten

RANK, ALPHA, TEMPERATURE, STEPS, WIDTH = 4, 8.0, 0.3, 5, 24
CLIP = 0.05  # of the gradient's norm: small enough to act
TARGETS = r"language_model/.*(q|k|v|o|gate|up|down)_proj$"
GROUPS = ((7, 5, 3, 1), (9, 2, 6, 4), (5, 5, 8, 3))  # lengths of queries, targets and negatives


def batch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    sides = [
        (parity.text_inputs(lengths, vocabulary=90, seed=10 * step + number),)
        for number, lengths in enumerate(GROUPS)
    ]
    orders = [rng.permutation(4).astype(np.int32) for _ in GROUPS]
    vectors = rng.standard_normal((12, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query, target, negative = sides
    return Batch(
        query, target, orders[0], orders[1], vectors, negative=negative, negative_order=orders[2]
    )


@pytest.fixture(scope="module")
def schedule():
    return optim.learning_rate_schedule(peak=5e-4, kind="linear", warmup_steps=2, steps=STEPS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_llava.write(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def ours(directory, schedule):
    """First and last adapters, and the losses on the way."""
    model, _ = embedder.load_model(directory, dtype="float32", part="language")
    adapters = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": TARGETS}
    embedder.attach_adapters(model, adapters, seed=0)
    graphdef, state = nnx.split(model)
    trainable, frozen = optim.split_trainable(
        flatten(nnx.to_pure_dict(state)), [optim.ADAPTER_PATTERN]
    )
    first = {path: np.array(leaf) for path, leaf in trainable.items()}
    optimizer = optim.make_optimizer(schedule, clip_norm=CLIP)
    objective = steps.make_objective("distill", temperature=TEMPERATURE)
    step = steps.make_train_step(graphdef, objective, optimizer, schedule=schedule, seed=0)
    state, history = steps.create_state(trainable, optimizer), []
    for number in range(STEPS):
        state, metrics = step(state, frozen, batch(number))
        history.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return first, {path: np.array(leaf) for path, leaf in state.trainable.items()}, history


def adapter(reference, path: str, layer: int) -> torch.nn.Parameter:
    """The parameter of peft that a layer of one of our adapters is."""
    _, _, _, block, name, kind = path.split("/")[-6:]
    module = getattr(getattr(reference.language_model.layers[layer], block), name)
    return getattr(module, kind)["default"].weight


def embed(reference, groups, order) -> torch.Tensor:
    inputs = groups[0]
    hidden = reference.language_model(
        input_ids=torch.tensor(inputs.tokens).long(),
        attention_mask=torch.tensor(parity.mask(inputs)),
    ).last_hidden_state
    last = hidden[torch.arange(inputs.rows), torch.tensor(inputs.lengths).long() - 1]
    return torch.nn.functional.normalize(last, dim=-1)[torch.tensor(order).long()]


def theirs(directory, first, schedule):
    """Trains PyTorch's model from the same adapters on the same batches."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj",
    )
    wrapped = peft.get_peft_model(tiny_llava.read(directory), config).eval()
    reference = wrapped.get_base_model().model
    with torch.no_grad():
        for path, value in first.items():
            for layer, part in enumerate(value):
                adapter(reference, path, layer).copy_(torch.tensor(part.T))
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == sum(x.size for x in first.values())
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
    history = []
    for number in range(STEPS):
        rows = batch(number)
        student = torch.cat(
            [
                embed(reference, rows.query, rows.query_order),
                embed(reference, rows.target, rows.target_order),
                embed(reference, rows.negative, rows.negative_order),
            ]
        )
        teacher = torch.tensor(rows.vectors)
        loss = torch.nn.functional.kl_div(
            torch.log_softmax(student @ student.T / TEMPERATURE, -1),
            torch.softmax(teacher @ teacher.T / TEMPERATURE, -1),
            reduction="batchmean",
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.param_groups[0]["lr"] = float(schedule(number))
        optimizer.step()
        history.append((float(loss.detach()), float(norm)))
    return reference, history


def test_five_steps_are_pytorchs(directory, ours, schedule):
    first, last, history = ours
    reference, expected = theirs(directory, first, schedule)
    np.testing.assert_allclose(history, expected, rtol=1e-4)
    assert len(last) == 14 and min(norm for _, norm in expected) > CLIP
    for path, value in last.items():
        wanted = np.stack(
            [adapter(reference, path, i).detach().numpy().T for i in range(len(value))]
        )
        assert np.abs(wanted - first[path]).max() > 1e-4, path
        np.testing.assert_allclose(value, wanted, rtol=0, atol=tolerances.MODULE, err_msg=path)
