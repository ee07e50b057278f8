"""Five optimiser steps of stage 2 equal PyTorch's: images and texts, hard negatives, full batch."""

import numpy as np
import peft
import pictures
import tiny_llava
import tolerances
import torch
from flax import nnx
from test_training_parity import adapter

from unime_jax import embedder, optim, steps
from unime_jax.models.clip import MEAN, STD
from unime_jax.types import Batch, flatten

ROWS, K, MARGIN, TEMPERATURE, STEPS, RANK, ALPHA = 6, 2, 0.02, 0.1, 5, 4, 16.0
SIZE, TILES = tiny_llava.SIZE, 3
TARGETS = r"language_model/.*(q|k|v|o|gate|up|down)_proj$"


def rows(reference, step: int):
    """Queries of a picture and a text, and targets of text alone, as `pictures.pack` takes them."""
    rng = np.random.default_rng(step)
    (_, (_, places, _, grid)) = tiny_llava.rows(reference)
    query, target = [], []
    for _ in range(ROWS):
        ids = np.where(places >= 0, 0, rng.integers(1, tiny_llava.IMAGE_TOKEN, len(places)))
        tiles = rng.integers(0, 256, (TILES, SIZE, SIZE, 3)).astype(np.uint8)
        query.append((ids, places, tiles, grid))
        ids = rng.integers(1, tiny_llava.IMAGE_TOKEN, 7)
        target.append((ids, np.full(7, -1), None, None))
    return query, target, [rng.permutation(ROWS).astype(np.int32) for _ in range(2)]


def ours(directory, reference, schedule):
    """Returns first and last adapters, and loss and gradient norm of every step."""
    model, _ = embedder.load_model(directory, dtype="float32")
    adapters = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": TARGETS, "vision": False}
    embedder.attach_adapters(model, adapters, seed=0)
    graphdef, state = nnx.split(model)
    trainable, frozen = optim.split_trainable(
        flatten(nnx.to_pure_dict(state)), [optim.ADAPTER_PATTERN]
    )
    first = {path: np.array(leaf) for path, leaf in trainable.items()}
    optimizer = optim.make_optimizer(schedule)
    objective = steps.make_objective("contrast", temperature=TEMPERATURE, k=K, margin=MARGIN)
    step = steps.make_train_step(graphdef, objective, optimizer, schedule=schedule, seed=0, chunk=4)
    state, history = steps.create_state(trainable, optimizer), []
    for number in range(STEPS):
        query, target, orders = rows(reference, number)
        groups = [(pictures.pack(side, size=SIZE),) for side in (query, target)]
        batch = Batch(*groups, *orders, target_ids=np.arange(ROWS, dtype=np.int32))
        state, metrics = step(state, frozen, batch)
        history.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return first, {path: np.array(leaf) for path, leaf in state.trainable.items()}, history


def embed(reference, side, order):
    ids, places = (np.stack([row[i] for row in side]) for i in (0, 1))
    ids = torch.tensor(np.where(places >= 0, tiny_llava.IMAGE_TOKEN, ids)).long()
    pixels = sizes = None
    if side[0][2] is not None:
        tiles = torch.tensor(np.stack([row[2] for row in side]))
        pixels = ((tiles / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 1, 4, 2, 3)
        sizes = torch.tensor([[SIZE, 2 * SIZE]] * len(side))
    out = reference(input_ids=ids, pixel_values=pixels, image_sizes=sizes)
    last = torch.nn.functional.normalize(out.last_hidden_state[:, -1], dim=-1)
    return last[torch.tensor(order).long()]


def hard_negative_loss(query, target):
    """The paper's Eqs. 3 and 4, row by row."""
    similarity = query @ target.T
    total = 0.0
    for i, row in enumerate(similarity):
        limit = float(row[i].detach()) + MARGIN
        others = [j for j in range(ROWS) if j != i and float(row[j].detach()) <= limit]
        hardest = sorted(others, key=lambda j: -float(row[j].detach()))[:K]
        if hardest:
            picked = [hardest[slot % len(hardest)] for slot in range(K)]
            logits = row[[i, *picked]] / TEMPERATURE
            total = total + torch.logsumexp(logits, 0) - logits[0]
    return total / ROWS


def test_five_steps_are_pytorchs(tmp_path):
    directory = tiny_llava.write(tmp_path / "llava")
    schedule = optim.learning_rate_schedule(peak=5e-4, kind="linear", warmup_steps=2, steps=STEPS)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj",
    )
    wrapped = peft.get_peft_model(tiny_llava.read(directory), config).eval()
    whole = wrapped.get_base_model()
    reference = whole.model
    first, last, history = ours(directory, whole, schedule)
    with torch.no_grad():
        for path, value in first.items():
            for layer, part in enumerate(value):
                adapter(reference, path, layer).copy_(torch.tensor(part.T))
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
    expected = []
    for number in range(STEPS):
        query, target, orders = rows(whole, number)
        loss = hard_negative_loss(
            embed(reference, query, orders[0]), embed(reference, target, orders[1])
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = float(schedule(number))
        optimizer.step()
        expected.append((float(loss.detach()), float(norm)))
    np.testing.assert_allclose(history, expected, rtol=1e-4)
    for path, value in last.items():
        wanted = [adapter(reference, path, i).detach().numpy().T for i in range(len(value))]
        assert np.abs(np.stack(wanted) - first[path]).max() > 1e-4, path
        np.testing.assert_allclose(
            value, np.stack(wanted), rtol=0, atol=tolerances.MODULE, err_msg=path
        )
