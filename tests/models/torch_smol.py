"""The small multimodal model in PyTorch: EfficientNet-Lite0, projector, a Llama of transformers.

Nothing of unime_jax is imported: the speed test beside PyTorch counts this process's memory.
"""

import json
import pathlib

import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
import transformers

STAGES = (  # kernel, stride, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def torch_grid(state, tiles, stages):
    """The published network, written down once more: padding and strides as TensorFlow has them."""

    def same(x, weight, stride, groups=1):
        size = weight.shape[-1]
        pads = []
        for n in (x.shape[3], x.shape[2]):
            total = max((-(-n // stride) - 1) * stride + size - n, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)

    def norm(x, name):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{n}"] for n in names), eps=1e-3)

    x = (torch.tensor(tiles).permute(0, 3, 1, 2).float() - 127) / 128
    x = F.relu6(norm(same(x, state["_conv_stem.weight"], 2), "_bn0"))
    number = 0
    for _, stage_stride, expand, _, count in stages:
        for n in range(count):
            prefix, y = f"_blocks.{number}.", x
            stride = stage_stride if n == 0 else 1
            if expand != 1:
                y = same(y, state[f"{prefix}_expand_conv.weight"], 1)
                y = F.relu6(norm(y, f"{prefix}_bn0"))
            weight = state[f"{prefix}_depthwise_conv.weight"]
            y = F.relu6(norm(same(y, weight, stride, len(weight)), f"{prefix}_bn1"))
            y = norm(same(y, state[f"{prefix}_project_conv.weight"], 1), f"{prefix}_bn2")
            x = x + y if x.shape == y.shape and stride == 1 else y
            number += 1
    return F.relu6(norm(same(x, state["_conv_head.weight"], 1), "_bn1"))


def area_weights(inputs: int, outputs: int) -> torch.Tensor:
    """Means over areas of one axis, parts of a position included; f32[inputs, outputs]."""
    edges = torch.arange(outputs + 1) * (inputs / outputs)
    first, last = torch.arange(inputs)[:, None], torch.arange(1, inputs + 1)[:, None]
    overlap = torch.minimum(last, edges[1:]) - torch.maximum(first, edges[:-1])
    return overlap.clamp(min=0) * (outputs / inputs)


def load(directory: str):
    """Reads a directory in the layout of `unime_jax.models.smol`.

    Returns:
      tower: uint8[N, S, S, 3] -> f32[N, P, D], vectors of the decoder's input space.
      language: LlamaForCausalLM.
      settings: vision_config.
    """
    path = pathlib.Path(directory)
    config = json.loads((path / "config.json").read_text())
    state = safetensors.torch.load_file(path / "model.safetensors")

    def part(prefix):
        return {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}

    with torch.device("meta"):
        text = {k: v for k, v in config["text_config"].items() if k != "model_type"}
        language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
    language.load_state_dict(part("language_model."), strict=False, assign=True)
    language.tie_weights()
    # Frequencies of the rotary positions are no weights; they are made anew.
    language.model.rotary_emb = type(language.model.rotary_emb)(language.config)
    vision, projector = part("vision_tower."), part("multi_modal_projector.")
    settings = config["vision_config"]
    grid = settings.get("grid", settings["image_size"] // 32)

    @torch.no_grad()
    def tower(tiles):
        x = torch_grid(vision, tiles, settings.get("stages", STAGES))
        if grid < x.shape[2]:
            weights = area_weights(x.shape[2], grid)
            x = torch.einsum("nchw,hi,wj->ncij", x, weights, weights)
        x = x.flatten(2).transpose(1, 2)
        if "norm.weight" in projector:
            x = F.layer_norm(x, x.shape[-1:], projector["norm.weight"], projector["norm.bias"])
        x = F.gelu(F.linear(x, projector["linear_1.weight"], projector["linear_1.bias"]))
        return F.linear(x, projector["linear_2.weight"], projector["linear_2.bias"])

    return tower, language.eval(), settings
