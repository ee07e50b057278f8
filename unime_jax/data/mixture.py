"""What a batch is made of: fixed shares of strata, each an endless shuffled stream."""

import functools
from collections.abc import Sequence

import numpy as np

from unime_jax.types import UserError

ROUND = 4  # padded lengths are multiples of this


def shares(
    sizes: Sequence[int],
    batch: int,
    *,
    weights: Sequence[int | float] | None = None,
    temperature: int | float = 1.0,
    block: int = 0,
) -> list[int]:
    """Divides a batch among strata by the largest remainder.

    Args:
      sizes: rows of each stratum; an empty one gets nothing.
      batch: rows to divide.
      weights: shares instead of sizes; they need not sum to 1.
      temperature: shares are proportional to size ** (1 / temperature).
      block: every share is a multiple of it and at least one block; 0: any number.

    Raises:
      UserError: negative or only zero weights, all strata empty, or too few blocks.
    """
    if block:
        return _blocks(sizes, batch, block, weights=weights, temperature=temperature)
    wanted = np.asarray(sizes if weights is None else weights, np.float64)
    if len(wanted) != len(sizes) or np.any(wanted < 0) or not np.isfinite(wanted).all():
        raise UserError(f"weights {list(wanted)}: one finite share of at least 0 for each set")
    wanted = np.where(np.asarray(sizes) > 0, wanted, 0.0)
    if not wanted.any():
        raise UserError("no rows to train on: every set is empty or has weight 0")
    wanted = np.where(wanted > 0, (wanted / wanted.max()) ** (1 / temperature), 0.0)
    exact = batch * wanted / wanted.sum()
    counts = np.floor(exact).astype(int)
    # Stable: of equal remainders the first stratum wins, on every machine.
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: batch - counts.sum()]] += 1
    return counts.tolist()


def _blocks(sizes, batch: int, block: int, *, weights, temperature) -> list[int]:
    wanted = np.asarray(sizes if weights is None else weights, np.float64)
    used = (wanted > 0) & (np.asarray(sizes) > 0)
    if batch % block or batch // block < used.sum():
        raise UserError(
            f"config.data.block={block}: {batch} rows do not divide into blocks of it, one or more "
            f"for each of the {used.sum()} sets; choose a smaller divisor"
        )
    small = np.zeros(len(wanted), bool)  # sets that get one block, though their share is less
    while True:
        rest = np.where(small, 0, sizes)
        left = batch // block - int(small.sum())
        counts = np.array(small, int)
        if left:
            counts += shares(
                rest.astype(int).tolist(), left, weights=weights, temperature=temperature
            )
        if (counts[used] > 0).all():
            return (block * counts).tolist()
        small |= used & (counts == 0)


class Mixture:
    """Draws the rows of every batch, as a function of seed and step alone.

    Attributes:
      counts: rows of each stratum in a batch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch: int,
        *,
        weights: Sequence[int | float] | None = None,
        temperature: int | float = 1.0,
        seed: int = 0,
    ):
        self.counts = shares(sizes, batch, weights=weights, temperature=temperature)
        self._sizes = list(sizes)
        self._seed = seed
        self._remember()

    def _remember(self) -> None:
        # A step touches one or two epochs of a stratum; neighbouring steps the same ones.
        self._epoch = functools.lru_cache(maxsize=4 * len(self._sizes))(self._permutation)

    def __getstate__(self):
        """Leaves what is remembered behind: another process remembers its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._remember()

    def _permutation(self, stratum: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, stratum, epoch)).permutation(self._sizes[stratum])

    def row(self, stratum: int, position: int) -> int:
        """Returns the row at a position of a stratum's stream; each epoch is a permutation."""
        epoch, place = divmod(position, self._sizes[stratum])
        return int(self._epoch(stratum, epoch)[place])

    def rows(self, step: int) -> list[tuple[int, int]]:
        """Lists the (stratum, row) pairs of a batch, stratum by stratum."""
        return [
            (number, self.row(number, step * count + place))
            for number, count in enumerate(self.counts)
            for place in range(count)
        ]


def bin_edges(lengths: np.ndarray, weights: np.ndarray, bins: int) -> np.ndarray:
    """Chooses upper bounds of length bins so that padding is least.

    Args:
      lengths: of the rows.
      weights: how often each row is drawn.
      bins: how many bins there may be.

    Returns:
      Rising bounds; the last is the longest length.
    """
    values = -(-lengths // ROUND) * ROUND
    bounds = np.unique(values)
    mass = np.array([weights[values == bound].sum() for bound in bounds])
    total = np.concatenate([[0.0], np.cumsum(mass)])
    # cost[j]: least padded length of the rows up to bound j; one more bin a round.
    cost = total[1:] * bounds
    before = [np.full(len(bounds), -1)]
    for _ in range(min(bins, len(bounds)) - 1):
        choices = cost[:, None] + (total[None, 1:] - total[1:, None]) * bounds[None, :]
        choices[np.tril_indices(len(bounds))] = np.inf  # the bin before ends lower
        choices = np.concatenate([choices, cost[None, :]])
        before.append(np.where(choices.argmin(0) == len(bounds), -2, choices.argmin(0)))
        cost = choices.min(0)
    edges, at = [], len(bounds) - 1
    for step in reversed(before):
        if step[at] == -2:  # another bin would not help here
            continue
        edges.append(bounds[at])
        at = step[at]
    return np.array(edges[::-1])


def fill_up(rows: np.ndarray, where: np.ndarray, bins: int, count: int) -> list[np.ndarray]:
    """Moves rows to longer bins until every bin in use gets a row of each batch.

    Args:
      rows: of one source, short to long.
      where: the bin of each row.
      bins: how many there are.
      count: rows that a batch takes of the source.

    Returns:
      The members of each bin, in order; some may be empty.
    """
    least = -(-len(rows) // count)
    parts = [rows[where == i] for i in range(bins)]
    for i in reversed(range(bins)):
        for below in reversed(range(i)):
            missing = least - len(parts[i])
            if not len(parts[i]) or missing <= 0:
                break
            split = max(0, len(parts[below]) - missing)
            parts[i] = np.concatenate([parts[below][split:], parts[i]])
            parts[below] = parts[below][:split]
    for i in range(bins - 1):  # what is left over at the short end
        if 0 < len(parts[i]) < least:
            longer = next(j for j in range(i + 1, bins) if len(parts[j]))
            parts[longer] = np.concatenate([parts[i], parts[longer]])
            parts[i] = parts[i][:0]
    return [np.sort(part) for part in parts]
