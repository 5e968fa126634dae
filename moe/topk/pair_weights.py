"""How the two candidates of a pair share one row in a round of successive halving.

All of them are softmaxes over the pair, so each is given by its log odds: the stronger candidate's weight is
sigmoid(log_odds), the weaker one's sigmoid(-log_odds).
"""

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.isotonic.checks import require

# b^v grows past e^20 only where the smallest difference of two float32 scores already saturates their weights.
_MAX_LOG_BOOST = 20.0
# sigmoid(2 sinh 5) is 1, in float64 too; further out the slope would overflow and meet the sigmoid's 0.
_MAX_SINH = 5.0


class Round(NamedTuple):
    """One round: its number, from 0, and how many candidates enter it, fillers of the first round included."""

    number: int
    entrants: int


@runtime_checkable
class PairWeights(Protocol):
    """Log odds of the stronger candidate of every pair in a round, from finite scores with strong >= weak."""

    def log_odds(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: Round
    ) -> Float[Array, "*b m"]:
        """0 for equal scores, growing with the difference."""
        ...


@dataclasses.dataclass(frozen=True)
class BoostedSoftmax:
    """softmax(base^strong, base^weak): the weights of the paper's released code, at base 20 for scores in (0, 1]."""

    base: float = 20.0

    def __post_init__(self) -> None:
        require(self.base > 1, "base", self.base, "greater than 1")

    def log_odds(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: Round
    ) -> Float[Array, "*b m"]:
        """base^strong - base^weak, factored so that neither close nor large scores lose the difference."""
        log_base = math.log(self.base)
        boost = jnp.exp(jnp.minimum(log_base * strong, _MAX_LOG_BOOST))
        return -boost * jnp.expm1(log_base * (weak - strong))


@dataclasses.dataclass(frozen=True)
class BoostedNormalised:
    """base^strong / (base^strong + base^weak): a softmax with another base than e, as the paper's text reads."""

    base: float = 20.0

    def __post_init__(self) -> None:
        require(self.base > 1, "base", self.base, "greater than 1")

    def log_odds(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: Round
    ) -> Float[Array, "*b m"]:
        """log(base) (strong - weak)."""
        return math.log(self.base) * (strong - weak)


@dataclasses.dataclass(frozen=True)
class Softmax:
    """softmax(sharpness * strong, sharpness * weak)."""

    sharpness: float = 10.0

    def __post_init__(self) -> None:
        require(self.sharpness > 0, "sharpness", self.sharpness, "positive")

    def log_odds(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: Round
    ) -> Float[Array, "*b m"]:
        """sharpness (strong - weak)."""
        return self.sharpness * (strong - weak)


@dataclasses.dataclass(frozen=True)
class CentredBoost:
    """softmax(base^(u/2), base^(-u/2)), u the difference of the scores in units of the round's spread.

    Every round keeps about the better half, so scores that are spread evenly over (0, 1] span half as much after it,
    and weights that depend on the bare difference tend to 1/2 as rounds go on: the operator degrades as n/k grows. Here
    u = 2^round (strong - weak) h / (h + 1), with h pairs in the round, is of order one in every round; the last factor
    allows for the larger part of the span that lies between neighbours where they are few. Only differences of scores
    matter, not their level. Exponential in u, the log odds leave close pairs undecided, which keeps their gradient.
    """

    base: float = 1e6

    def __post_init__(self) -> None:
        require(self.base > 1, "base", self.base, "greater than 1")

    def log_odds(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: Round
    ) -> Float[Array, "*b m"]:
        """base^(u/2) - base^(-u/2)."""
        pairs = this_round.entrants // 2
        half = 0.5 * math.log(self.base) * 2.0**this_round.number * pairs / (pairs + 1)
        return 2 * jnp.sinh(jnp.minimum(half * (strong - weak), _MAX_SINH))
