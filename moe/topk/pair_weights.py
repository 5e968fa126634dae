"""How the two candidates of a pair share one row in a round of successive halving."""

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.isotonic.checks import require

# b^v grows past e^20 only where the smallest difference of two float32 scores already saturates their weights.
_MAX_LOG_BOOST = 20.0


class Round(NamedTuple):
    """One round. inputs: candidates before the first round. entrants: those that enter this one."""

    inputs: int
    entrants: int


@runtime_checkable
class PairWeights(Protocol):
    """The weights of every pair in a round, from finite scores with strong >= weak."""

    def shares(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: Round
    ) -> tuple[Float[Array, "*b m"], Float[Array, "*b m"]]:
        """The weights of the stronger and of the weaker: 1/2 for equal scores; their sum is 1."""
        ...


@dataclasses.dataclass(frozen=True)
class BoostedSoftmax:
    """softmax(base^strong, base^weak): the weights of the released code of arXiv 2010.15552, for scores in (0, 1].

    base: 20 there; larger is sharper. Raises ValueError unless it is above 1.
    """

    base: float = 20.0

    def __post_init__(self) -> None:
        require(self.base > 1, "base", self.base, "greater than 1")

    def shares(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: Round
    ) -> tuple[Float[Array, "*b m"], Float[Array, "*b m"]]:
        """From base^strong - base^weak, factored so that neither close nor large scores lose the difference."""
        log_base = math.log(self.base)
        boost = jnp.exp(jnp.minimum(log_base * strong, _MAX_LOG_BOOST))
        return _softmax_of_pair(-boost * jnp.expm1(log_base * (weak - strong)))


@dataclasses.dataclass(frozen=True)
class BoostedNormalised:
    """base^strong / (base^strong + base^weak): a softmax with another base than e, as arXiv 2010.15552's text reads.

    base: larger is sharper. Raises ValueError unless it is above 1.
    """

    base: float = 20.0

    def __post_init__(self) -> None:
        require(self.base > 1, "base", self.base, "greater than 1")

    def shares(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: Round
    ) -> tuple[Float[Array, "*b m"], Float[Array, "*b m"]]:
        """From log(base) (strong - weak)."""
        return _softmax_of_pair(math.log(self.base) * (strong - weak))


@dataclasses.dataclass(frozen=True)
class Softmax:
    """softmax(sharpness * strong, sharpness * weak), the other reading of arXiv 2010.15552's text.

    Raises ValueError unless sharpness is positive.
    """

    sharpness: float = 10.0

    def __post_init__(self) -> None:
        require(self.sharpness > 0, "sharpness", self.sharpness, "positive")

    def shares(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: Round
    ) -> tuple[Float[Array, "*b m"], Float[Array, "*b m"]]:
        """From sharpness (strong - weak)."""
        return _softmax_of_pair(self.sharpness * (strong - weak))


@dataclasses.dataclass(frozen=True)
class CentredBoost:
    """(1 + g(u)) / 2 and (1 - g(u)) / 2, with u the difference of the scores over the difference that decides a pair.

    Every round keeps about the better half, so n scores that are spread evenly over (0, 1) lie 1/n apart in the last
    round as in the first, and weights that depend on the bare difference tend to 1/2 as n/k grows. Here differences
    count in units of 1/n, which for even scores is in ranks, and `ranks` + `field` · m of them decide a pair among m
    candidates. Pairs are 1, 3, ..., m-1 ranks apart on average, so a share `field` of them stays open in a large round;
    `ranks` is for small ones, where all hangs on a pair or two and the distance of neighbours varies as much as it
    measures. Only differences of scores matter, not their level.

    g(u) = u ((1 + linear^2) / (u^2 + linear^2))^(1/4) up to u = 1, and 1 from there on: linear in u up to about
    `linear`, then its square root. A row's cosine with its winner suffers from weights near 1/2 far more than from
    weights near 1, so g climbs fast at first; the rest of the climb is stretched over all differences that the round
    leaves open, and there the gradient is. A decided pair has none. This project's own; no paper has it.

    ranks, field, linear: as above. Raises ValueError unless all are positive.
    """

    ranks: float = 0.875
    field: float = 0.125
    linear: float = 0.2

    def __post_init__(self) -> None:
        for name in ("ranks", "field", "linear"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")

    def shares(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: Round
    ) -> tuple[Float[Array, "*b m"], Float[Array, "*b m"]]:
        """(1 + g(u)) / 2 and (1 - g(u)) / 2."""
        deciding = (self.ranks + self.field * this_round.entrants) / this_round.inputs
        u = jnp.minimum((strong - weak) / deciding, 1.0)
        bend = self.linear**2
        half = 0.5 * u * ((1 + bend) / (u * u + bend)) ** 0.25
        return 0.5 + half, 0.5 - half


def _softmax_of_pair(log_odds: Float[Array, "*b m"]) -> tuple[Float[Array, "*b m"], Float[Array, "*b m"]]:
    """Both weights, the smaller one without the rounding error of a difference from 1."""
    return jax.nn.sigmoid(log_odds), jax.nn.sigmoid(-log_odds)
