"""Updates that would do harm are left out: those of a loss or gradient that isn't finite, or far above the last ones.

All of it happens inside the jitted step; the host learns of it with the metrics, at log points.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.types import PyTree


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which updates are left out, and when the run gives up.

    spike: an update is left out whose loss, or global norm of the gradient, exceeds the mean of the last `window`
        accepted ones by more than so many standard deviations of theirs, of at least 1 % of the mean each; 0: only
        those that aren't finite. There is no bound before so many have been accepted. (The rule of OLMo-core's
        SkipStepOptimizer, 128 steps and 6 there; a healthy run of configs/digits.py reaches 6.6.)
    abort_after: updates left out in a row with which the run ends, looked at at log points; 0: never.
    """

    spike: float = 10.0
    window: int = 128
    abort_after: int = 10

    def __post_init__(self) -> None:
        if self.spike < 0 or self.abort_after < 0 or self.window < 2:
            raise ValueError(
                f"guard.spike = {self.spike:g} and guard.abort_after = {self.abort_after} must not be negative, and "
                f"guard.window = {self.window} at least 2."
            )


class GuardState(NamedTuple):
    """What the bounds are made of, and counts.

    losses, norms: of the last accepted steps, in no order. accepted, skipped: steps so far. in_a_row: steps skipped
    since the last accepted one.
    """

    losses: Float[Array, "W"]
    norms: Float[Array, "W"]
    accepted: Int[Array, ""]
    skipped: Int[Array, ""]
    in_a_row: Int[Array, ""]


class Verdict(NamedTuple):
    """Whether an update is to be applied, the guard's next state, and what to log of it."""

    is_good: Bool[Array, ""]
    state: GuardState
    metrics: dict[str, Float[Array, ""]]


def init_guard(config: GuardConfig) -> GuardState:
    """Before the first step."""
    window = jnp.zeros(config.window, jnp.float32)
    zero = jnp.zeros((), jnp.int32)
    return GuardState(window, window, zero, zero, zero)


def judge(config: GuardConfig, state: GuardState, loss: Float[Array, ""], gradient_norm: Float[Array, ""]) -> Verdict:
    """Looks at a step's loss and the global norm of its gradient, which is finite only where all of that is.

    Metrics: skipped, updates left out so far; skipped_in_a_row; nonfinite and spike, 1 where this step is one.
    """
    is_finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    is_spike = jnp.zeros((), bool)
    if config.spike:
        above = (loss > _bound(state.losses, config.spike)) | (gradient_norm > _bound(state.norms, config.spike))
        is_spike = is_finite & above & (state.accepted >= config.window)
    is_good = is_finite & ~is_spike
    place = state.accepted % config.window
    accepted, skipped = is_good.astype(jnp.int32), (~is_good).astype(jnp.int32)
    state = GuardState(
        losses=jnp.where(is_good, state.losses.at[place].set(loss), state.losses),
        norms=jnp.where(is_good, state.norms.at[place].set(gradient_norm), state.norms),
        accepted=state.accepted + accepted,
        skipped=state.skipped + skipped,
        in_a_row=(state.in_a_row + skipped) * skipped,
    )
    counts = {
        "skipped": state.skipped,
        "skipped_in_a_row": state.in_a_row,
        "nonfinite": ~is_finite,
        "spike": is_spike,
    }
    return Verdict(is_good, state, {name: value.astype(jnp.float32) for name, value in counts.items()})


def keep_unless(is_good: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """The new arrays of a good step, the old ones otherwise."""
    return jax.tree.map(lambda new, old: jnp.where(is_good, new, old), new, old)


def _bound(values: Float[Array, "W"], spike: float) -> Float[Array, ""]:
    mean = jnp.mean(values)
    return mean + spike * jnp.maximum(jnp.std(values), 0.01 * jnp.abs(mean))
