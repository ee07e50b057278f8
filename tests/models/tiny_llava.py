"""A tiny random LLaVA-1.6 of transformers, and what it makes of a text and of a picture."""

import pathlib

import numpy as np
import parity
import pictures
import torch
import transformers

from unime_jax.models.clip import MEAN, STD

SIZE, PATCH, IMAGE_TOKEN = 28, 7, 90
CONFIG = {
    "model_type": "llava_next",
    "text_config": {
        **parity.TEXT,
        "model_type": "mistral",
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": PATCH,
    },
    "image_grid_pinpoints": [[28, 56], [56, 28]],
    "image_token_index": IMAGE_TOKEN,
}


def write(directory: pathlib.Path, *, seed: int = 0) -> pathlib.Path:
    """Writes the model as transformers does, with the tower's and the decoder's norms moved."""
    torch.manual_seed(seed)
    arguments = {key: value for key, value in CONFIG.items() if key != "model_type"}
    model = transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(**arguments)
    )
    parity.randomise(model, seed=seed)
    model.save_pretrained(directory)
    return directory


def read(directory: pathlib.Path):
    """Reads a directory with transformers, strictly."""
    model, said = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not any(said.values()), said
    return model.eval()


def rows(reference):
    """One row of text and one with a picture of three tiles; as `pictures.pack` takes them."""
    rng = np.random.default_rng(0)
    features = (SIZE // PATCH) ** 2
    tiles = rng.integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)
    # The reference itself lays out the numbers of the features: newline 0, then the tiles'.
    numbers = 1 + torch.arange(3 * features).reshape(3, features, 1)
    laid_out, _ = reference.model.pack_image_features(
        [numbers.float()], torch.tensor([[SIZE, 2 * SIZE]]), "default", torch.zeros(1)
    )
    index = laid_out[0][:, 0].numpy().astype(np.int32)
    ids = rng.integers(1, IMAGE_TOKEN, 6)
    with_picture = np.concatenate([ids[:2], np.zeros_like(index), ids[2:]])
    places = np.concatenate([[-1] * 2, index, [-1] * 4])
    return [(ids, np.full(6, -1), None, None), (with_picture, places, tiles, (1, 1))]


def embed(model) -> np.ndarray:
    """What transformers makes of the two rows: the last hidden state, scaled to length 1."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    vectors = []
    for ids, places, tiles, _ in rows(inner):
        ids = torch.tensor(np.where(places >= 0, IMAGE_TOKEN, ids))[None].long()
        pixels = sizes = None
        if tiles is not None:
            pixels = (torch.tensor(tiles) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
            pixels, sizes = pixels.permute(0, 3, 1, 2)[None], torch.tensor([[SIZE, 2 * SIZE]])
        with torch.no_grad():
            out = inner.model(input_ids=ids, pixel_values=pixels, image_sizes=sizes)
        vectors.append(torch.nn.functional.normalize(out.last_hidden_state[0, -1], dim=-1))
    return torch.stack(vectors).numpy()


def ours(model, reference) -> np.ndarray:
    """What our model makes of the two rows; `reference` lays the picture out."""
    found = rows(reference)
    return np.concatenate([parity.embed(model, pictures.pack([row], size=SIZE)) for row in found])
