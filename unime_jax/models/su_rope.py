"""RoPE with two sets of frequency factors, one for short rows and one for long ("su").

Source: the remote code of Phi-3-vision; transformers calls the same rule "longrope".
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Int

from unime_jax.models.config_json import check_numbers, part
from unime_jax.types import Array, UserError

NAMES = ("su", "longrope")


def asks_for_su_rope(config: dict[str, Any]) -> bool:
    """Says whether config.json's content asks for this kind of RoPE."""
    scaling = part(config, "rope_scaling") or {}
    return scaling.get("type", scaling.get("rope_type")) in NAMES


@dataclasses.dataclass(frozen=True)
class SuRope:
    """Is the rule, ready to be computed.

    Attributes:
      theta: base of the geometric series of frequencies.
      short_factor, long_factor: each frequency is divided by its factor, H / 2 of them.
      original_length: rows up to this length use the short factors, longer ones the long factors.
      magnitude: cosine and sine are multiplied by it, with either set.
    """

    theta: float
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    magnitude: float

    @classmethod
    def from_hf(cls, config: dict[str, Any], head_width: int) -> "SuRope | None":
        """Reads config.json's content; None where it asks for plain RoPE.

        Raises:
          UserError: another kind of scaling, or a key that is missing or does not fit.
        """
        scaling = part(config, "rope_scaling")
        if not scaling:
            return None
        check_numbers(config, real=("rope_theta",), optional=True)
        kind = scaling.get("type", scaling.get("rope_type"))
        if kind not in NAMES:
            raise UserError(
                f"config.json: rope_scaling.type = {kind!r} is not supported, only "
                + " and ".join(map(repr, NAMES))
            )
        unknown = sorted(set(scaling) - {"type", "rope_type", "short_factor", "long_factor"})
        if unknown:
            raise UserError(f"config.json: rope_scaling has unknown keys {', '.join(unknown)}")
        factors = []
        for name in ("short_factor", "long_factor"):
            values = scaling.get(name)
            if (
                not isinstance(values, list)
                or len(values) != head_width // 2
                or not all(isinstance(x, int | float) and 0 < x < math.inf for x in values)
            ):
                raise UserError(
                    f"config.json: rope_scaling.{name} must hold {head_width // 2} positive numbers"
                )
            factors.append(tuple(map(float, values)))
        lengths = []
        for name in ("max_position_embeddings", "original_max_position_embeddings"):
            if not isinstance(config.get(name), int) or config[name] < 2:
                raise UserError(f"config.json: {name} = {config.get(name)!r} is no row length")
            lengths.append(config[name])
        longest, original = lengths
        magnitude = math.sqrt(1 + math.log(longest / original) / math.log(original))
        return cls(
            theta=float(config.get("rope_theta") or 10000.0),
            short_factor=factors[0],
            long_factor=factors[1],
            original_length=original,
            magnitude=magnitude if longest > original else 1.0,
        )

    def tables(
        self, tokens: int, lengths: Int[Array, " G"]
    ) -> tuple[Float[Array, "G T 1 half"], Float[Array, "G T 1 half"]]:
        """Returns cosine and sine of every position of every row, f32.

        The factor set follows from a row's own length, never from its batch-mates or its padding.
        """
        short = jnp.asarray(self.short_factor, jnp.float32)
        long = jnp.asarray(self.long_factor, jnp.float32)
        factor = jnp.where((lengths > self.original_length)[:, None], long, short)
        half = len(self.short_factor)
        exponent = jnp.arange(half, dtype=jnp.float32) / half
        frequency = 1.0 / (factor * self.theta**exponent)
        positions = jnp.arange(tokens, dtype=jnp.float32)
        angle = positions[None, :, None, None] * frequency[:, None, None, :]
        return jnp.cos(angle) * self.magnitude, jnp.sin(angle) * self.magnitude
