"""PyTorch's side of a training step: `python torch_side.py FOLDER VARIANT`, then see workers.

transformers and peft, SDPA, right-padded rows without a mask (its fastest path), two passes over
chunks as VLM2Vec's gradient cache takes them (one over a group that is a single chunk), AdamW.
VARIANT is "eager", "compile" (every layer of the decoder and of the tower by torch.compile),
"checkpoint" (eager with gradient checkpointing) or "checkpoint_compile".
Nothing of unime_jax is imported: this process's memory is measured.
"""

import pathlib
import re
import sys
import time

import numpy as np
import rows as rows_files
import workers

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Model:
    """The model of a case with its adapters.

    Attributes:
      trained: parameters that the optimiser changes.
    """

    def __init__(self, folder, settings, variant, device, dtype):
        import torch

        self.torch, self.device, self.dtype = torch, device, dtype
        start = time.perf_counter()
        self._read(pathlib.Path(settings["model"]["path"]))
        self.load_seconds = time.perf_counter() - start
        self._adapt(settings["train"]["adapters"])
        self._fill(folder / "first.npz")
        if variant.startswith("checkpoint"):
            options = {"use_reentrant": False}
            self.language.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            self.language.train()  # there is no dropout in it, and it checkpoints only so
        if variant.endswith("compile"):
            layers = [*self.language.layers]
            if self.whole is not None:
                layers += [*self.whole.model.vision_tower.encoder.layers]
            torch._dynamo.config.cache_size_limit = 64
            for layer in layers:
                layer.compile(dynamic=False)

    def _read(self, directory: pathlib.Path) -> None:
        import json

        import transformers

        options = {"dtype": self.dtype, "attn_implementation": "sdpa"}
        self.whole = self.projector = None
        kind = json.loads((directory / "config.json").read_text())["model_type"]
        if kind == "llava_next":
            self.whole = transformers.LlavaNextForConditionalGeneration.from_pretrained(
                directory, **options
            ).to(self.device)
            self.language, self.image_token = (
                self.whole.model.language_model,
                self.whole.config.image_token_id,
            )
            return
        self._read_smol(directory)

    def _read_smol(self, directory: pathlib.Path) -> None:
        import safetensors.torch

        sys.path.insert(0, str(workers.ROOT / "tests" / "models"))
        import torch_smol

        nn = self.torch.nn
        _, language, _ = torch_smol.load(str(directory))
        self.language = language.model.to(self.device, self.dtype)
        state = safetensors.torch.load_file(directory / "model.safetensors")
        prefix = "multi_modal_projector."
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        first, second = state["linear_1.weight"], state["linear_2.weight"]
        parts = {
            "norm": nn.LayerNorm(first.shape[1]),
            "linear_1": nn.Linear(*first.shape[::-1]),
            "gelu": nn.GELU(),
            "linear_2": nn.Linear(*second.shape[::-1]),
        }
        self.projector = nn.Sequential()
        for name, part in parts.items():
            self.projector.add_module(name, part)
        self.projector.load_state_dict(state)
        self.projector.to(self.device, self.dtype)

    def _adapt(self, adapters) -> None:
        import peft

        for parameter in self.language.parameters():
            parameter.requires_grad_(False)
        self.adapted = None
        if not adapters["rank"]:
            return
        root = self.language if self.whole is None else self.whole
        config = peft.LoraConfig(
            r=adapters["rank"],
            lora_alpha=adapters["alpha"],
            lora_dropout=0.0,
            target_modules=("" if self.whole is None else r".*language_model\.")
            + r"layers\.\d+\..*(q|k|v|o|gate|up|down)_proj",
        )
        self.adapted = peft.get_peft_model(root, config)
        if self.whole is not None:
            for name, parameter in self.whole.named_parameters():
                parameter.requires_grad_("lora_" in name)

    def _fill(self, path: pathlib.Path) -> None:
        """Sets what is trained, and only that is trained."""
        torch = self.torch
        self.trained = []
        if self.projector is not None:
            for parameter in self.projector.parameters():
                parameter.requires_grad_(False)
        with np.load(path) as file:
            for name in file.files:
                found = list(self._parameters(name, file[name]))
                for parameter, value in found:
                    with torch.no_grad():
                        parameter.copy_(torch.tensor(value))
                    parameter.requires_grad_(True)
                    self.trained.append(parameter)
        wanted = [p for p in self.language.parameters() if p.requires_grad]
        assert {id(p) for p in wanted} <= {id(p) for p in self.trained}

    def _parameters(self, name, value):
        """Yields PyTorch's parameters that one of ours is, with their values."""
        if name.startswith("multi_modal_projector/"):
            part, kind = name.split("/")[1:]
            ours = {"kernel": "weight", "scale": "weight", "bias": "bias"}[kind]
            parameter = getattr(getattr(self.projector, part), ours)
            yield parameter, value.T if kind == "kernel" else value
            return
        block, linear, kind = re.fullmatch(r".*/layers/(\w+)/(\w+)/(lora_[AB])", name).groups()
        for number, layer in enumerate(self.language.layers):
            module = getattr(getattr(layer, block), linear)
            yield getattr(module, kind)["default"].weight, value[number].T

    def embed(self, group: rows_files.Group, chosen: slice):
        """Embeds rows of a group; unit rows, f32."""
        torch = self.torch
        # In bfloat16 the adapters are f32, as peft leaves them, and autocast keeps them fast;
        # without adapters it would only turn what is bfloat16 already into f32 and back.
        mixed = self.dtype == torch.bfloat16 and self.adapted is not None
        with torch.autocast(self.device, torch.bfloat16, enabled=mixed):
            return self._embed(group, chosen)

    def _embed(self, group: rows_files.Group, chosen: slice):
        torch = self.torch
        tokens = torch.as_tensor(group.tokens[chosen], device=self.device).long()
        lengths = torch.as_tensor(group.lengths[chosen], device=self.device).long()
        places = torch.as_tensor(group.image_index[chosen], device=self.device).long()
        if not group.tiles.shape[1]:
            out = self.language(input_ids=tokens, use_cache=False)
        elif self.whole is not None:
            out = self._with_tiles(group, chosen, tokens, places)
        else:
            features = torch.as_tensor(group.features[chosen], device=self.device).to(self.dtype)
            found = self.projector(features.flatten(1, 2))
            embeds = self.language.embed_tokens(tokens)
            width = embeds.shape[-1]
            picked = found.gather(1, places.clamp(min=0)[..., None].expand(-1, -1, width))
            embeds = torch.where((places >= 0)[..., None], picked, embeds)
            out = self.language(inputs_embeds=embeds, use_cache=False)
        last = out.last_hidden_state[torch.arange(len(tokens), device=self.device), lengths - 1]
        return torch.nn.functional.normalize(last.float(), dim=-1)

    def _with_tiles(self, group, chosen, tokens, places):
        torch = self.torch
        tiles = torch.as_tensor(group.tiles[chosen], device=self.device).float()
        mean, std = (torch.tensor(x, device=self.device) for x in (MEAN, STD))
        pixels = ((tiles / 255 - mean) / std).permute(0, 1, 4, 2, 3).to(self.dtype)
        sizes = torch.tensor([group.picture] * len(tokens), device=self.device)
        ids = torch.where(places >= 0, self.image_token, tokens)
        return self.whole.model(
            input_ids=ids, pixel_values=pixels, image_sizes=sizes, use_cache=False
        )


class Step:
    """A training step with a two-pass gradient cache; what needs no chunks goes in one pass."""

    def __init__(self, model: Model, rows: rows_files.Rows, settings):
        import torch

        self.torch, self.model, self.rows, self.settings = torch, model, rows, settings
        optim = settings["optim"]
        self.optimizer = (
            None
            if settings["case"]["forward"]
            else torch.optim.AdamW(
                model.trained,
                lr=optim["learning_rate"],
                betas=(optim["b1"], optim["b2"]),
                eps=1e-8,
                weight_decay=0.0,
            )
        )
        # Groups of one shape are encoded as one, as ours are: fewer chunks, and fuller ones.
        self.merged = rows.merged()
        longest = max(group.tokens.shape[1] for group, _ in self.merged)
        self.parts = []  # (group, rows) of every chunk
        for group, _ in self.merged:
            count = len(group.lengths)
            size = rows_files.chunk_of(settings["train"]["chunk"], group.tokens.shape[1], longest)
            for start in range(0, count, size or count):
                self.parts.append((group, slice(start, start + (size or count))))
        lengths = [(group.tokens.shape[1], len(group.lengths[part])) for group, part in self.parts]
        # Positions of a row -> rows of the largest chunk.
        self.at_once = {str(t): max(n for other, n in lengths if other == t) for t, _ in lengths}

    def __call__(self) -> dict[str, float]:
        torch, model = self.torch, self.model
        if self.settings["case"]["forward"]:
            return self._forward()
        self.optimizer.zero_grad()
        if not self.settings["train"]["chunk"]:
            found = [model.embed(group, chosen) for group, chosen in self.parts]
            loss = self._loss(found)
            loss.backward()
        else:
            kept = []  # of a group that is one chunk its graph, so that it is encoded once
            for group, chosen in self.parts:
                alone = chosen.stop - chosen.start >= len(group.lengths)
                with torch.set_grad_enabled(alone):
                    kept.append(model.embed(group, chosen))
            found = [vectors.detach().requires_grad_() for vectors in kept]
            loss = self._loss(found)
            loss.backward()
            for (group, chosen), vectors, graph in zip(self.parts, found, kept, strict=True):
                if graph.requires_grad:
                    graph.backward(vectors.grad)
                else:
                    (model.embed(group, chosen) * vectors.grad).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.trained, self.settings["optim"]["clip_norm"])
        self.optimizer.step()
        return {"loss": float(loss.detach()), "gradient_norm": float(norm)}

    def _forward(self) -> dict[str, list[float]]:
        with self.torch.no_grad():
            found = [self.model.embed(group, chosen) for group, chosen in self.parts]
        sides = self._sides(found)
        return rows_files.fingerprint({side: x.cpu().numpy() for side, x in sides.items()})

    def _sides(self, found) -> dict:
        """Returns the vectors of every side in order, from those of the chunks."""
        by_group, start = {}, 0
        vectors = self.torch.cat(found)
        for _, members in self.merged:
            for side, number, rows in members:
                by_group[side, number] = vectors[start : start + rows]
                start += rows
        sides = {}
        for side, groups in self.rows.sides.items():
            vectors = self.torch.cat([by_group[side, number] for number in range(len(groups))])
            order = self.torch.as_tensor(self.rows.orders[side], device=vectors.device).long()
            sides[side] = vectors[order]
        return sides

    def _loss(self, found):
        torch, settings = self.torch, self.settings["loss"]
        sides = self._sides(found)
        if self.settings["stage"] == "distill":
            return self._distill(torch.cat(list(sides.values())))
        query, target = sides["query"], sides["target"]
        similarity = query @ target.T
        fixed, k = similarity.detach(), settings["k"]
        out = fixed > fixed.diag()[:, None] + settings["margin"]
        out |= torch.eye(len(fixed), dtype=bool, device=fixed.device)
        if self.rows.target_ids is not None and settings["mask_equal_targets"]:
            ids = torch.as_tensor(self.rows.target_ids, device=fixed.device)
            out |= ids[:, None] == ids[None, :]
        ranked = fixed.masked_fill(out, -torch.inf).topk(min(k, len(fixed)), dim=1).indices
        left = (~out).sum(1, keepdim=True)
        slots = torch.arange(k, device=fixed.device)[None] % left.clamp(min=1)
        picked = similarity.gather(1, ranked.gather(1, slots))
        picked = picked.masked_fill(left == 0, -torch.inf)
        logits = torch.cat([similarity.diag()[:, None], picked], 1) / settings["temperature"]
        return (torch.logsumexp(logits, 1) - logits[:, 0]).mean()

    def _distill(self, student):
        torch, settings = self.torch, self.settings["loss"]
        teacher = torch.as_tensor(self.rows.vectors, device=student.device)
        own = torch.eye(len(student), device=student.device) * -1e9
        own = own * (not settings["kl_diagonal"])
        log_q, log_p = (
            torch.log_softmax(x @ x.T / settings["temperature"] + own, -1)
            for x in (student, teacher)
        )
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def setup(folder: pathlib.Path, variant: str, device: str):
    import torch

    torch.set_num_threads(workers.THREADS if device == "cpu" else torch.get_num_threads())
    settings = rows_files.read_case(folder)
    dtype = getattr(torch, settings["model"]["dtype"])
    model = Model(folder, settings, variant, device, dtype)
    if settings["case"]["one_pass"] and variant.startswith("checkpoint"):
        settings["train"]["chunk"] = 0
    step = Step(model, rows_files.load(folder / "rows.npz"), settings)

    def act():
        found = step()
        if device != "cpu":
            torch.cuda.synchronize()
        return found

    start = time.perf_counter()
    first = act()
    said = {"load_seconds": model.load_seconds, "first_seconds": time.perf_counter() - start}
    return {**said, "first": first, "at_once": step.at_once}, act


def peak(device: str) -> dict[str, float]:
    import torch

    if device == "cpu":
        return {"peak": workers.process_peak()}
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),  # as the allocator cuts it up
        "card": torch.cuda.get_device_properties(0).total_memory,
    }


if __name__ == "__main__":
    device = sys.argv[3] if len(sys.argv) > 3 else "cpu"
    if device == "cpu":
        workers.keep_to_two_cores()
    folder = pathlib.Path(sys.argv[1])
    workers.serve(lambda: setup(folder, sys.argv[2], device), lambda: peak(device))
