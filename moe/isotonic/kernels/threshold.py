"""Threshold on TPU: tau of `moe.isotonic.Threshold` for tiles of tokens, by Newton's method inside a bracket.

With u = (x - x_(k))/strength and t = (tau - x_(k))/strength in [-1, u_(k+1)], the mask is clip(u - t, 0, 1)^r,
r = 1/(p-1), and t the root of

    excess(t) = sum_(i <= k) (min(u_i - t, 1)^r - 1) + sum_(i > k) max(u_i - t, 0)^r

which needs the k largest apart from the others, but neither of the two in order: a selection network does that. For a
fixed set of saturated entries the excess is convex and falling, so that Newton's method from the left converges
monotonically, for p = 2 in finitely many steps; a step that leaves the bracket (the saturated set changed) becomes a
bisection. All entries of a mask move in the same direction with t, so none is off by more than |excess|. After eight
steps all problems but rare ones are exact to rounding; a tile that holds one of those goes on until it is, too.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe.isotonic import networks, pnorm
from moe.isotonic.implementation import Crossing
from moe.isotonic.kernels.tiles import Tiling

_STEPS = 8
# Ends the loop whatever happens: bisections alone need 24 to exhaust float32.
_MOST_REPAIRS = 40
# More entries than this are summed by a loop: unrolled, the compiler holds all their terms at once, and spills.
_UNROLLED = 32
# The excess that rounding leaves grows with the number of terms near 1.
_TOLERANCE = 2e-6
_BRACKET_TOLERANCE = 1e-7
_TINY = 1e-30


def crossing(
    x: Float[Array, "*b n"], strength: Float[Array, ""] | float, *, k: int, p: float, interpret: Any = False
) -> Crossing:
    """tau such that sum_i clip((x_i - tau)/strength, 0, 1)^(1/(p-1)) = k, for every problem along the last axis.

    p in {4/3, 3/2, 2} and static k; strength may be traced. A problem with a NaN, or whose k-th largest entry is
    infinite, gives NaN. residual: size of the last step of tau. interpret: False compiles for a TPU; True or
    `pltpu.InterpretParams()` runs on any machine. Not differentiable: derivatives follow from the solution.
    """
    return _run(x, strength, k, p, interpret, arrays=0)[1]


def mask(
    x: Float[Array, "*b n"], strength: Float[Array, ""] | float, *, k: int, p: float, interpret: Any = False
) -> tuple[Float[Array, "*b n"], Crossing]:
    """The mask itself, written by the same kernel, and what `crossing` returns."""
    (y,), found = _run(x, strength, k, p, interpret, arrays=1)
    return y, found


def _run(
    x: Array, strength: Array | float, k: int, p: float, interpret: Any, arrays: int
) -> tuple[list[Array], Crossing]:
    """Call the kernel on all problems; what it computes free of strength comes back in units of x."""
    tiling = Tiling.of(x)
    strength = jnp.asarray(strength, jnp.float32)
    *masks, center, offset, residual = tiling.run(
        functools.partial(_kernel, tiling=tiling, k=k, r=int(pnorm.exponent(p)), arrays=arrays),
        x,
        strength,
        arrays=arrays,
        scalars=3,
        scratch=[pltpu.VMEM((tiling.n, *tiling.entry), jnp.float32)],
        name="threshold",
        interpret=interpret,
    )
    return masks, Crossing(center, strength * offset, center - strength * offset, strength * residual)


def _kernel(inverse_strength: Any, block: Any, *refs: Any, tiling: Tiling, k: int, r: int, arrays: int) -> None:
    """Solve one tile. refs: outputs (masks, then center, offset, residual), then scratch (u, then staging)."""
    (center_out, offset_out, residual_out, u_ref), staging = refs[arrays : arrays + 4], refs[arrays + 4 :]
    staged = tiling.stage(block, staging[:1])
    values = networks.select(tiling.n, k).apply([tiling.load(staged, i) for i in range(tiling.n)])
    scale, center = inverse_strength[0], values[k - 1]
    for i, value in enumerate(values):
        u_ref[i] = (value - center) * scale
    # Where x_(k) - x_(k+1) >= strength, t = -1 makes the mask hard, exactly.
    gap = jnp.minimum((center - values[k]) * scale, 1) if k < tiling.n else jnp.ones_like(center)
    state = _solve(lambda i: u_ref[i], tiling.n, k, r, gap)
    t = jnp.where(gap >= 1, -1, state.t)
    center_out[...], offset_out[...], residual_out[...] = center, -t, jnp.where(gap >= 1, 0, state.step)
    if arrays:
        target = staging[1] if tiling.transposes else refs[0]
        for i in range(tiling.n):
            z = jnp.clip((tiling.load(staged, i) - center) * scale - t, 0, 1)
            tiling.store(target, i, _power(z, r))
        tiling.unstage(target, refs[0])


class _State(NamedTuple):
    """t, its bracket, the excess at the t before, and the size of the step from there."""

    t: Float[Array, "rows lanes"]
    low: Float[Array, "rows lanes"]
    high: Float[Array, "rows lanes"]
    excess: Float[Array, "rows lanes"]
    step: Float[Array, "rows lanes"]


def _solve(u: Callable[[Any], Array], n: int, k: int, r: int, gap: Float[Array, "rows lanes"]) -> _State:
    """Newton's method from t = -1 in the bracket [-1, -gap], eight steps and more where a column needs them."""
    low = jnp.full_like(gap, -1)
    step = functools.partial(_newton, u, n, k, r)
    state = lax.fori_loop(0, _STEPS, lambda _, s: step(s), _State(low, low, -gap, low, low))
    tolerance = _TOLERANCE * max(1.0, min(k, n - k) / 8)

    def unfinished(carry: tuple[Array, _State]) -> Array:
        repairs, s = carry
        # NaN compares false: a column with a NaN is finished.
        pending = (jnp.abs(s.excess) > tolerance) & (s.high - s.low > _BRACKET_TOLERANCE)
        return (repairs < _MOST_REPAIRS) & (jnp.max(jnp.where(pending, 1.0, 0.0)) > 0)

    return lax.while_loop(unfinished, lambda c: (c[0] + 1, step(c[1])), (jnp.int32(0), state))[1]


def _newton(u: Callable[[Any], Array], n: int, k: int, r: int, state: _State) -> _State:
    """One step of Newton's method, or of bisection where that leaves the bracket or divides by nothing."""
    t, low, high, _, _ = state
    zero = jnp.zeros_like(t)
    excess, slope = _sum_terms(u, k, n, functools.partial(_rest, t=t, r=r), (zero, zero))
    excess, slope = _sum_terms(u, 0, k, functools.partial(_largest, t=t, r=r), (excess, slope))
    low, high = jnp.where(excess > 0, t, low), jnp.where(excess < 0, t, high)
    proposed = t + excess / jnp.maximum(r * slope, _TINY)
    inside = (proposed >= low) & (proposed <= high)
    new = jnp.where(inside, proposed, 0.5 * (low + high))
    return _State(new, low, high, excess, jnp.abs(new - t))


def _largest(u: Array, t: Array, r: int) -> tuple[Array, Array]:
    """What one of the k largest entries adds to the excess and to -excess'/r; u >= 0 >= t, so u - t >= 0."""
    z = jnp.minimum(u - t, 1)
    lower = _power(z, r - 1)
    # At u - t = 1 the slope on the right counts, where Newton's method goes.
    return (z if r == 1 else lower * z) - 1, jnp.where(u - t <= 1, lower, 0)


def _rest(u: Array, t: Array, r: int) -> tuple[Array, Array]:
    """The same for one of the other entries; u <= 0 and t >= -1, so u - t <= 1."""
    z = jnp.maximum(u - t, 0)
    lower = jnp.where(z > 0, 1.0, 0.0) if r == 1 else _power(z, r - 1)
    return z if r == 1 else lower * z, lower


def _sum_terms(
    u: Callable[[Any], Array], start: int, stop: int, term: Callable[[Array], tuple[Array, Array]], total: tuple
) -> tuple:
    """total + sum of term(u_i) over start <= i < stop, long sums by a loop over chunks."""

    def chunk(first: Any, size: int, total: tuple) -> tuple:
        terms = [term(u(first + i)) for i in range(size)]
        return tuple(a + _strand_sum([t[j] for t in terms]) for j, a in enumerate(total))

    chunks = (stop - start) // _UNROLLED if stop - start > _UNROLLED else 0
    if chunks:
        total = lax.fori_loop(0, chunks, lambda c, s: chunk(start + c * _UNROLLED, _UNROLLED, s), total)
    done = start + chunks * _UNROLLED
    return chunk(done, stop - done, total) if done < stop else total


def _strand_sum(terms: list[Array]) -> Array:
    """A sum in four strands: short chains of dependent additions, few partial sums alive."""
    strands = terms[:4]
    for i, term in enumerate(terms[4:]):
        strands[i % 4] += term
    while len(strands) > 1:
        strands = [a + b for a, b in zip(strands[::2], strands[1::2], strict=False)] + strands[len(strands) & ~1 :]
    return strands[0]


def _power(z: Array, exponent: int) -> Array:
    """z^0 = 1, z, z^2 or z^3, by multiplications."""
    return lax.integer_pow(z, exponent)
