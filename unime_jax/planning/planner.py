"""Puts a plan together, part by part, the quick ones first."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from unime_jax import runtime, sharding
from unime_jax.models.attention import ATTENTIONS
from unime_jax.planning import (
    abstract,
    alike,
    backbones,
    collectives,
    compiled,
    composition,
    estimate,
    flops,
    memory,
    page,
    pieces,
    search,
)
from unime_jax.planning import topology as topologies
from unime_jax.planning.topology import Topology


def make(
    settings: dict[str, Any],
    name: str,
    topology: Topology,
    *,
    mfu: float,
    compiles: str | None,
    searches: bool,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Plans a configuration.

    Args:
      settings: the resolved configuration.
      name: of its file.
      topology: what to plan for.
      mfu: share of the peak rate that products run at.
      compiles: compile the step, one of `plan.COMPILES`; None: not.
      searches: compare values of chunk and remat.
      tell: gets the text of every part as soon as it is known.

    Returns:
      The plan, ready for JSON: bytes of one device, operations of all.
    """
    with compiled.quiet():
        jax.devices()  # it reports what is not there
    planner = _Planner(settings, name, topology, mfu)
    plan = planner.head()
    tell(page.head(plan))
    plan |= planner.arguments()
    tell(page.arguments(plan))
    plan |= planner.operations()
    tell(page.operations(plan))
    plan |= planner.current()
    tell(page.current(plan))
    if searches:
        plan |= planner.search(compiles, tell)
        tell(page.search(plan))
    elif compiles:
        tell(page.compiling(plan))
        plan |= planner.compile(planner.setting, tell, compiles)
        tell(page.compiled(plan["compiled"], plan))
    return plan


class _Planner:
    def __init__(self, settings: dict[str, Any], name: str, topology: Topology, mfu: float):
        self.settings, self.name, self.topology, self.mfu = settings, name, topology, mfu
        topologies.check_attention(
            topology, settings["model"]["attention"], settings["model"]["dtype"]
        )
        self.backbone = backbones.find(settings, name)
        model = abstract.model(settings, self.backbone.config, "xla")
        self.composition = composition.find(settings, self.backbone, model)
        sizes = topologies.mesh_shape(topology, **settings["mesh"])
        self.mesh = sharding.abstract_mesh(*sizes)
        self.setting = settings["train"]["chunk"], settings["model"]["remat"]

    def head(self) -> dict[str, Any]:
        """Says what is planned, for what, and what is assumed."""
        chip, found, train = self.topology.chip, self.composition, self.settings["train"]
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        padded = sum(rows * tokens for rows, tokens, _ in found.encoded(devices))
        return {
            "config": self.name,
            "topology": {
                "name": self.topology.name,
                "title": self.topology.describe(),
                "chips": self.topology.chips,
                "devices": self.topology.devices,
                "hosts": self.topology.hosts,
                "device_memory": chip.memory,
                "device_flops": chip.flops,
                "device_bandwidth": chip.bandwidth,
                "device_link": chip.link,
                "device_network": chip.network,
                "source": chip.source,
            },
            "mesh": dict(self.mesh.shape),
            "model": {
                "title": self.backbone.title,
                "dtype": self.settings["model"]["dtype"],
                "quantize": train["quantize"],
                "published_sizes": self.backbone.directory is None,
                "config.model.path": self.settings["model"]["path"],
            },
            "batch": {
                "rows": train["batch_size"],
                "groups": {
                    side: [list(group) for group in getattr(found, side)]
                    for side in composition.SIDES
                },
                "tokens": found.real_tokens,
                "padded_tokens": float(padded),
                "padded_share": 1 - found.real_tokens / padded,
                "source": found.source,
            },
            "steps": found.steps,
            "chunk": self.setting[0],
            "remat": self.setting[1],
            "mfu": self.mfu,
        }

    def arguments(self) -> dict[str, Any]:
        run = self._run(self.setting, self.mesh)
        self._arguments = memory.arguments(run)
        sizes = dataclasses.asdict(self._arguments)
        return {"arguments": {**sizes, "total": self._arguments.total}}

    def operations(self) -> dict[str, Any]:
        run = self._run(self.setting, self.mesh)
        jaxpr, used = flops.trace(run.step, *run.arguments)
        counted = flops.count_jaxpr(jaxpr)
        self._idle = memory.idle(run, used)
        self.estimator = estimate.Estimator(
            self.settings,
            self.backbone.config,
            self.composition,
            self._arguments,
            counted.model,
            topology=self.topology,
            mesh=self.mesh,
            mfu=self.mfu,
            flash=self._flash(),
        )
        self._counted = {self.setting: counted}
        return {"flops": _operations(counted), "idle_arguments": self._idle}

    def current(self) -> dict[str, Any]:
        """Estimates peak and time of the configuration as it is."""
        return {"estimate": self._estimated(self.setting), "limit": self._limit()}

    def search(self, compiles: str | None, tell: Callable[[str], None]) -> dict[str, Any]:
        """Compares settings; compiles the fastest ones until one fits, if wanted (see `make`)."""
        found = search.candidates(self.estimator, self._arguments.total, self.setting)
        tried = []
        if compiles:
            tell(page.searching(found, self._limit()))
            tried = search.compile_in_turn(
                self._in_turn(found),
                lambda setting: self.compile(setting, tell, compiles)["compiled"],
                base=self._arguments.total,
                limit=self.estimator.limit,
                tell=tell,
            )
            best = next((one for one in tried if one["fits"]), None)
        else:
            best = self._best(found)
        result: dict[str, Any] = {
            "search": found,
            "search_compiles": compiles is not None,
            "tried": tried,
            "recommended": None,
        }
        if best is not None:
            setting = best["chunk"], best["remat"]
            counted = self._count(setting)
            result["recommended"] = {
                **self._estimated(setting),
                "flops_parts": _operations(counted),
                "compiled": best.get("compiled"),
            }
            if best.get("compiled"):
                result["compiled"] = best["compiled"]
        return result

    def _best(self, found: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Returns the fastest that fits; the setting as it is where another is no faster.

        Times of others are scaled from probes, within some percent; these two are counted.
        """
        fastest = next((one for one in found if one["fits"]), None)
        if fastest is None:
            return None

        def seconds(one):
            self._count((one["chunk"], one["remat"]))
            return self._estimated((one["chunk"], one["remat"]))["seconds"]

        own = [one for one in found if (one["chunk"], one["remat"]) == self.setting and one["fits"]]
        return min([*own, fastest], key=seconds) if own else fastest

    def _in_turn(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Puts the setting as it is before the fastest that fits, if that is no faster."""
        turn, best = list(found), self._best(found)
        if best is not None:
            turn.remove(best)
            turn.insert([one["fits"] for one in found].index(True), best)
        return turn

    def compile(
        self,
        setting: tuple[int, str],
        tell: Callable[[str], None] = lambda text: None,
        how: str = "kinds",
    ) -> dict[str, Any]:
        """Compiles one setting: a piece of each kind, all "pieces" or the "whole" step."""
        started, platform = time.perf_counter(), self.topology.chip.platform
        if how == "whole":
            attention, found = self._compile_whole(setting)
            parts, pairs = [], [(found.arguments, self._arguments.total - self._idle)]
        else:
            parts = self._compile_pieces(setting, tell, how)
            attention = parts[0].attention
            pairs = [(one.compiled.arguments, one.arguments) for one in parts]
            found = pieces.together(
                parts,
                self._arguments.total - self._idle,
                self._arguments.adapters,
                time.perf_counter() - started,
            )
        crossing = [one for one in found.moved if one.hosts > 1]
        return {
            "compiled": {
                "chunk": setting[0],
                "remat": setting[1],
                "attention": attention,
                "seconds": found.seconds,
                "arguments": found.arguments,
                "temporaries": found.temporaries,
                "idle": self._idle,
                "peak": found.peak + self._idle,
                "fits": not found.refusal and found.peak + self._idle <= self.estimator.limit,
                "refusal": found.refusal,
                "arguments_match": bool(found.refusal)
                or all(compiled.same_arguments(*pair, platform) for pair in pairs),
                "collectives": [dataclasses.asdict(one) for one in found.moved],
                "collective_bytes": sum(one.bytes for one in found.moved),
                "collective_seconds": sum(one.sent / self._speed(one) for one in found.moved),
                "network_seconds": sum(one.sent / self._speed(one) for one in crossing),
                "loops_known": found.counted,
                "pieces": [one.summary() for one in parts],
            }
        }

    def _compile_whole(self, setting: tuple[int, str]) -> tuple[str, compiled.Compiled]:
        topologies.check_compiler(self.topology, kernel=self._flash())
        devices = topologies.compile_devices(self.topology)
        mesh = sharding.make_mesh(*self.mesh.shape.values(), devices=devices)
        attention = runtime.resolve_attention(
            self.settings["model"]["attention"], self.settings["model"]["dtype"], mesh
        )
        return attention, compiled.compile_step(
            self._run(setting, mesh, attention),
            self.topology.chip.platform,
            devices_of_host=self.topology.linked,
        )

    def _compile_pieces(self, setting: tuple[int, str], tell, how: str) -> list[pieces.Found]:
        """Compiles pieces until all are done or it is clear that the step does not fit."""
        topologies.check_compiler(self.topology, kernel=self._flash())
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        kinds = [[piece] for piece in pieces.divide(self.composition, setting[0], devices)]
        if how == "kinds" and self.mesh.shape["tensor"] == 1:  # else rows are exchanged too
            kinds = alike.kinds([piece for (piece,) in kinds], devices)
        others = {first: rest for first, *rest in kinds}
        job = pieces.Job(
            self._set(setting),
            self.backbone.config,
            self.composition,
            self.topology,
            tuple(self.mesh.shape.values()),
            self.estimator.width,
            self._flash(),
        )
        started, found, done = time.perf_counter(), [], 0
        with contextlib.closing(pieces.compile_all(list(others), job)) as coming:
            for one in coming:
                rest = others[one.piece]
                found += [one, *(alike.follow(one, piece, devices) for piece in rest)]
                done += 1
                took = time.perf_counter() - started
                tell(page.piece(one, rest, done, len(others), took))
                base = self._arguments.total
                peak = pieces.together(found, base, self._arguments.adapters, 0.0).peak
                if one.compiled.refusal or peak > self.estimator.limit:
                    break
        return found

    # ---- parts

    def _run(self, setting: tuple[int, str], mesh, attention: str = "xla") -> abstract.Run:
        return abstract.run(
            self._set(setting),
            self.backbone.config,
            self.composition,
            mesh=mesh,
            attention=attention,
        )

    def _set(self, setting: tuple[int, str]) -> dict[str, Any]:
        chunk, remat = setting
        return {
            **self.settings,
            "model": {**self.settings["model"], "remat": remat},
            "train": {**self.settings["train"], "chunk": chunk},
        }

    def _speed(self, moved: collectives.Collective) -> float:
        """Returns bytes/s at which each device of a ring sends: hosts' networks may be slower."""
        chip = self.topology.chip
        if moved.hosts == 1:
            return chip.link
        return min(chip.link, chip.network * moved.group / moved.hosts)

    def _count(self, setting: tuple[int, str]) -> flops.Flops:
        if setting not in self._counted:
            run = self._run(setting, self.mesh)
            self._counted[setting] = flops.count(run.step, *run.arguments)
        return self._counted[setting]

    def _flash(self) -> bool:
        """Says whether the platform's attention kernel keeps no scores of pairs of positions."""
        attention, platform = self.settings["model"]["attention"], self.topology.chip.platform
        kernel = {"gpu": "cudnn", "tpu": "splash"}[platform]
        if attention == "auto":
            return kernel in ATTENTIONS and self.settings["model"]["dtype"] == "bfloat16"
        return attention == kernel

    def _estimated(self, setting: tuple[int, str]) -> dict[str, Any]:
        counted = self._counted.get(setting)
        found = self.estimator.setting(*setting, exact=counted.total if counted else None)
        seconds = found.seconds
        return {
            **dataclasses.asdict(found),
            "temporaries": found.peak - self._arguments.total,
            "rate": self.estimator.rate,
            "products_seconds": self.estimator.compute_seconds(found.flops),
            "weights_seconds": self.estimator.weight_seconds(*setting),
            "pairs_per_second": self.settings["train"]["batch_size"] / seconds,
            "days": self.composition.steps * seconds / 86400,
        }

    def _limit(self) -> dict[str, Any]:
        chip = self.topology.chip
        return {
            "bytes": self.estimator.limit,
            "memory": chip.memory,
            "margin": estimate.margin(chip),
            "margin_words": estimate.margin_words(chip),
            "next_batch": self._arguments.batch,
        }


def _operations(counted: flops.Flops) -> dict[str, Any]:
    return {
        "needed": counted.parts,
        "again": counted.again,
        "model": counted.model,
        "total": counted.total,
    }
