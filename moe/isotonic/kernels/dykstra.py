"""Dykstra on TPU: the iterates of `moe.isotonic.Dykstra` for p = 2 and top-k's w, sort included, for tiles of tokens.

With u the sorted (x - x_(k))/strength, v0 = u - w, v_j = v0_j + a_j - a_(j-1) and one multiplier a_j >= 0 per pair of
neighbours, a sweep is a_j <- max(0, (v0_(j+1) - v0_j + a_(j-1) + a_(j+1))/2) for the first, third, ... pair, then for
all others. The first half is kept doubled, which saves its multiplication, and never leaves the registers: only the
second half is state. Values that every mask takes for saturated or excluded are clipped (|u| <= 1), so that
infinities do no harm. No permutation is needed: tau is read off the sorted solution, where its k largest values end.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe.isotonic import networks
from moe.isotonic.implementation import Crossing
from moe.isotonic.kernels.tiles import Tiling

# Sweeps per trip of the loop: fewer copies of loop-carried values.
_SWEEPS_PER_TRIP = 3
# A pair with this pull never violates: it completes the last second-half pair of an odd n.
_NEVER = -1e30


def crossing(
    x: Float[Array, "*b n"], strength: Float[Array, ""] | float, *, k: int, steps: int, interpret: Any = False
) -> Crossing:
    """tau of the mask with p = 2 for every problem along the last axis, after exactly `steps` sweeps.

    The mask is clip((x - tau)/strength, 0, 1), as good as the residual says: how far the two projections of the last
    sweep lie apart. Static k and steps >= 1; strength may be traced. A problem with a NaN, or whose k-th largest entry
    is infinite, gives NaN. interpret: False compiles for a TPU; True or `pltpu.InterpretParams()` runs on any machine.
    """
    tiling = Tiling.of(x)
    strength = jnp.asarray(strength, jnp.float32)
    center, offset, residual = tiling.run(
        functools.partial(_kernel, tiling=tiling, k=k, steps=steps),
        x,
        strength,
        arrays=0,
        scalars=3,
        scratch=[
            pltpu.VMEM((tiling.n, *tiling.entry), jnp.float32),
            pltpu.VMEM(((tiling.n - 1) // 2 + 2, *tiling.entry), jnp.float32),
        ],
        name="dykstra",
        interpret=interpret,
    )
    return Crossing(center, strength * offset, center - strength * offset, strength * residual)


def _kernel(inverse_strength: Any, block: Any, *refs: Any, tiling: Tiling, k: int, steps: int) -> None:
    """Solve one tile. refs: outputs (center, offset, residual), then scratch (pulls, multipliers, staging)."""
    center_out, offset_out, residual_out, pulls, seconds, *staging = refs
    n = tiling.n
    staged = tiling.stage(block, staging)
    values = networks.sort(n).apply([tiling.load(staged, i) for i in range(n)])
    scale, center = inverse_strength[0], values[k - 1]
    zero = jnp.zeros_like(center)
    u = [jnp.clip((value - center) * scale, -1, 1) for value in values]
    v0 = [u[i] - 1 if i < k else u[i] for i in range(n)]
    for j in range(n - 1):
        pulls[j] = (v0[j + 1] - v0[j]) * (1.0 if j % 2 == 0 else 0.5)
    if n % 2:
        pulls[n - 1] = jnp.full_like(center, _NEVER)
    for i in range((n - 1) // 2 + 2):
        seconds[i] = zero

    def trip(_: Any, carry: None, sweeps: int = _SWEEPS_PER_TRIP) -> None:
        for _ in range(sweeps):
            _sweep(pulls, seconds, n)
        return carry

    trip(0, None, sweeps=(steps - 1) % _SWEEPS_PER_TRIP)
    lax.fori_loop(0, (steps - 1) // _SWEEPS_PER_TRIP, trip, None)
    firsts, changes = _sweep(pulls, seconds, n)

    def multiplier(j: int) -> Array:
        """a_j: entry j rises by it, entry j + 1 falls by it."""
        if not 0 <= j < n - 1:
            return zero
        return seconds[(j + 1) // 2] if j % 2 else 0.5 * firsts[j // 2]

    t = zero - 1
    if k < n:
        # The two values at the boundary agree once the sweeps have converged.
        above, at, below = (multiplier(j) for j in (k - 2, k - 1, k))
        boundary = 0.5 * ((v0[k - 1] + at - above) + (v0[k] + below - at))
        hard = (center - values[k]) * scale >= 1
        t = jnp.where(hard, t, jnp.clip(boundary, -1, u[k]))
    center_out[...], offset_out[...] = center, -t
    residual_out[...] = functools.reduce(jnp.maximum, changes, zero)


def _sweep(pulls: Any, seconds: Any, n: int) -> tuple[list[Array], list[Array]]:
    """Both projections, from the first entry to the last, the second half in place between two guards that stay 0.

    Returns the first half's multipliers, doubled, and how far the second half's moved.
    """
    previous, changes = seconds[1], []
    firsts = [jnp.maximum(pulls[0] + previous, 0)]
    for i in range(1, (n - 1) // 2 + 1):
        following = seconds[i + 1]
        firsts.append(jnp.maximum(pulls[2 * i] + (previous + following), 0))
        updated = jnp.maximum(pulls[2 * i - 1] + 0.25 * (firsts[-2] + firsts[-1]), 0)
        changes.append(jnp.abs(updated - previous))
        seconds[i] = updated
        previous = following
    return firsts, changes
