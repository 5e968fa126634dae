"""The exact solver for top-k: one scalar equation in place of an isotonic problem.

For w = (1, ..., 1, 0, ..., 0) the permutahedron is the capped simplex {0 <= y <= 1, sum y = k}: at most one block
pools, and one number tau determines the solution, on unsorted values. With r = 1/(p-1):

* mask: y_i = clip((x_i - tau)/strength, 0, 1)^r with sum y = k, and tau in [x_(k) - strength, x_(k)];
* magnitude (x >= 0): let f(s) solve f = ((s - f)/strength)^r. Then y_i = f(x_i) where f(x_i) >= tau, and elsewhere
  y_i = tau m_i, m_i = clip((x_i - tau)/(strength tau^(1/r)), 0, 1)^r, with sum m = k and tau in [f(x_(k)), x_(k)].

Both are one equation in beta in [0, 1]. With a = 1 for the mask, f(x_(k))^(1/r) for the magnitude; width = strength a;
and kappa = 0 for the mask, width/f(x_(k)) for the magnitude: tau = (lower end) + beta width, and
m_i = clip(((x_i - x_(k))/width + 1 - beta) (1 + kappa beta)^(-1/r), 0, 1)^r. Nothing in it cancels for small strength,
because x enters only as x - x_(k), nor for large strength, because tau enters only as a sum of positive numbers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe.isotonic import pnorm
from moe.isotonic.checks import require
from moe.isotonic.implementation import Bound, Crossing, check_implementation, choose, refusal
from moe.isotonic.layout import Fence, finite, over_problems, vary_like
from moe.isotonic.selection import add_up, from_ordered_integers, kth_largest, ordered_integers
from moe.types import Solution

_MAX_KAPPA = 1e30
# Within a few floats of the solution the first step is exact but for rounding.
_NEWTON_OF_LONG = 2


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Bisection for tau, and Newton's method within the last bracket: linear in n, in a fixed number of passes.

    No step depends on data, so each problem's result is independent of its neighbours, and a batch that is sharded
    needs no communication.

    steps: halvings of the bracket; `newton` passes follow, which are exact once they know which entries lie strictly
    between 0 and 1 (p = 2) or converge quadratically (p < 2).
    implementation: "xla" is plain JAX; "pallas_tpu" is a kernel for TPUs (the mask with p = 2, 3/2 or 4/3, static k and
    n <= 256; elsewhere NotImplementedError), which takes its own steps; None picks the kernel where it can run.
    """

    steps: int = 11
    newton: int = 5
    implementation: str | None = None

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        require(isinstance(self.steps, int) and self.steps >= 1, "steps", self.steps, "an integer >= 1")
        require(isinstance(self.newton, int) and self.newton >= 1, "newton", self.newton, "an integer >= 1")

    def topk(
        self, x: Float[Array, "*b n"], k: Any, *, strength: Float[Array, ""], p: float, magnitude: bool = False
    ) -> Crossing:
        """Find tau on unsorted values (x >= 0 for magnitude), infinities acting as the largest numbers; NaN where x has
        a NaN. k is static or traced.
        """
        kernel = Bound(_by_kernel, (("k", k), ("p", p)))
        reference = Bound(_by_bisection, (("solver", self), ("k", k), ("p", p), ("magnitude", magnitude)))
        refused = refusal(x, k, p, (1, 2, 3), magnitude)
        return choose(self.implementation, kernel, reference, refused, x, strength)

    def solve(
        self,
        s: Float[Array, "*b n"],
        w: Float[Array, "*#b n"],
        *,
        strength: Float[Array, ""],
        p: float,
        magnitude: bool = False,
        origin: Float[Array, "*#b 1"] | float = 0.0,
    ) -> Solution:
        """Solve along the last axis for s in descending order and one w = (1, ..., 1, 0, ..., 0), not all 0."""
        s = s + origin
        k = jnp.sum(w.reshape(-1, w.shape[-1])[0]).astype(jnp.int32)
        crossing = self.topk(s, k, strength=strength, p=p, magnitude=magnitude)
        r = pnorm.exponent(p)
        selected = pnorm.power(pnorm.selected_root(s, strength, r), r) if magnitude else s - strength
        value = jnp.minimum(s, jnp.maximum(selected, crossing.value[..., None])) - origin
        steps = jnp.full(s.shape[:-1], self.steps + self.newton, jnp.int32)
        return Solution(value, steps, crossing.residual)


def _by_kernel(x: Float[Array, "*b n"], strength: Float[Array, ""], *, k: int, p: float) -> Crossing:
    """The TPU kernel, imported where it is wanted."""
    from moe.isotonic.kernels import threshold

    return threshold.crossing(finite(x), strength, k=k, p=p)


def _by_bisection(
    x: Float[Array, "*b n"], strength: Float[Array, ""], *, solver: Threshold, k: Any, p: float, magnitude: bool
) -> Crossing:
    """The reference, in the memory layout that suits the platform."""
    r = pnorm.exponent(p)

    def find(entries: Float[Array, "a n c"], axes: tuple[int, ...], k: Any, strength: Array, fence: Fence) -> Crossing:
        return _crossing(entries, axes, k, strength, fence, r, magnitude, solver)

    return over_problems(find, x, k, strength)


def _crossing(
    entries: Float[Array, "a n c"],
    axes: tuple[int, ...],
    k: Any,
    strength: Float[Array, ""],
    fence: Fence,
    r: float | int,
    magnitude: bool,
    solver: Threshold,
) -> Crossing:
    """Centre, set up the equation in beta, solve it, and translate back to tau."""
    if not magnitude and len(axes) > 1:
        return _crossing_of_long(entries, axes, k, strength, r, solver)
    center = kth_largest(entries, k, axes, fence)
    if magnitude:
        level = pnorm.selected_root(center, strength, r)
        low, width = pnorm.power(level, r), strength * level
        kappa = jnp.minimum(width / jnp.where(low > 0, low, 1), _MAX_KAPPA)
    else:
        low, width, kappa = center - strength, jnp.broadcast_to(strength, center.shape), None
    # Each pass below is to read the heights, not to compute them, the centre included, again.
    heights = fence(lambda x, center, width: (x - center) / jnp.where(width > 0, width, 1) + 1, entries, center, width)
    equation = _Equation(heights, jnp.asarray(k, entries.dtype), kappa, r, axes)
    beta, step = _polish(equation, *_bisect(equation, solver.steps), solver.newton)
    hard = add_up((heights > 0).astype(entries.dtype), axes) <= equation.k
    # What is exact without iteration stays exact; a NaN among the entries has made the centre one, and is kept.
    beta = jnp.where(hard, 0, beta) + 0 * center
    return Crossing(center, (1 - beta) * width, low + beta * width, jnp.where(hard, 0, step) * width)


def _crossing_of_long(
    entries: Float[Array, "a n c"],
    axes: tuple[int, ...],
    k: Any,
    strength: Float[Array, ""],
    r: float | int,
    solver: Threshold,
) -> Crossing:
    """The mask's tau where finding x_(k) first would take most of the time.

    The centre is the largest float at which the mask still sums to k or more, found bit by bit: x minus a float that is
    near has no rounding error to speak of. tau lies between it and the next float.
    """
    wanted, scale = jnp.asarray(k, entries.dtype), 1 / strength

    def heights(center: Array) -> Array:
        return (entries - center) * scale

    def keep_bit(step: Array, found: Array) -> Array:
        candidate = found + (jnp.ones((), found.dtype) << (bits - 1 - step).astype(found.dtype))
        total = add_up(_masks(heights(from_ordered_integers(candidate, entries.dtype)), r), axes)
        return jnp.where(total >= wanted, candidate, found)

    like = ordered_integers(entries[:, :1, :1])
    lowest = vary_like(jnp.full_like(like, jnp.iinfo(like.dtype).min), entries)
    bits = lowest.dtype.itemsize * 8
    found = lax.fori_loop(0, bits, keep_bit, lowest)
    center, following = (from_ordered_integers(key, entries.dtype) for key in (found, found + 1))
    # A NaN among the entries makes every sum NaN, and no bit is kept.
    equation = _Equation(heights(center), wanted, None, r, axes)
    # The last bits are within the rounding of a long sum; Newton's method, which counts ones apart, may differ.
    reach = 4 * (following - center) * scale
    beta, step = _polish(equation, -reach, reach, min(solver.newton, _NEWTON_OF_LONG))
    above = equation.heights > 0
    hard = add_up(above.astype(entries.dtype), axes) <= wanted
    lowest_selected = jnp.min(jnp.where(above, entries - center, jnp.inf), axis=axes, keepdims=True)
    offset = jnp.where(hard, strength - lowest_selected, -beta * strength)
    return Crossing(center, offset, center - offset, jnp.where(hard, 0, step) * strength)


class _Equation(NamedTuple):
    """sum_i m_i(beta) = k for every problem; kappa is None for the mask, where it is 0."""

    heights: Float[Array, "a n c"]
    k: Float[Array, ""]
    kappa: Float[Array, "#a 1 #c"] | None
    r: float | int
    axes: tuple[int, ...]

    def at(self, position: Float[Array, "#a 1 #c"]) -> Float[Array, "#a 1 #c"]:
        """beta at a position in [0, 1]; the magnitude's tau may span many orders, so there it moves in log(tau)."""
        if self.kappa is None:
            return position
        some = self.kappa > 0
        grown = jnp.expm1(position * jnp.log1p(self.kappa)) / jnp.where(some, self.kappa, 1)
        return jnp.where(some, jnp.clip(grown, 0, 1), position)

    def factor(self, beta: Float[Array, "#a 1 #c"]) -> Float[Array, "#a 1 #c"]:
        """(1 + kappa beta)^(-1/r)."""
        return jnp.ones_like(beta) if self.kappa is None else 1 / pnorm.root(1 + self.kappa * beta, self.r)

    def above(self, beta: Float[Array, "#a 1 #c"]) -> Float[Array, "a n c"]:
        """What is to be clipped to [0, 1] for m^(1/r)."""
        above = self.heights - beta
        return above if self.kappa is None else above * self.factor(beta)


def _masks(above: Float[Array, "a n c"], r: float | int) -> Float[Array, "a n c"]:
    """clip(above, 0, 1)^r."""
    # Clipped last, since jaxlib 0.10 on CPU takes twenty times as long for sums over what is a product.
    base = above if r == 1 or r == 3 else jnp.maximum(above, 0)
    return pnorm.unit_clip(pnorm.power(base, r))


def _bisect(equation: _Equation, steps: int) -> tuple[Array, Array]:
    """Bounds of beta after so many halvings; nothing pools at 0, and at 1 the mask's sum is at most k."""

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        near, width = bracket
        middle = near + 0.5 * width
        total = add_up(_masks(equation.above(equation.at(middle)), equation.r), equation.axes)
        return jnp.where(total >= equation.k, middle, near), 0.5 * width

    shape = tuple(1 if axis in equation.axes else size for axis, size in enumerate(equation.heights.shape))
    zero = vary_like(jnp.zeros(shape, equation.heights.dtype), equation.heights)
    # All brackets are of one width, so that a step stores one number per problem; both are exact in binary.
    near, width = lax.fori_loop(0, steps, halve, (zero, jnp.ones((), zero.dtype)))
    return equation.at(near), equation.at(near + width)


class _Iterate(NamedTuple):
    """Bounds of beta, beta, the beta before, and the excess there (0 before the first step)."""

    near: Float[Array, "#a 1 #c"]
    far: Float[Array, "#a 1 #c"]
    beta: Float[Array, "#a 1 #c"]
    previous: Float[Array, "#a 1 #c"]
    excess: Float[Array, "#a 1 #c"]


def _polish(equation: _Equation, near: Array, far: Array, steps: int) -> tuple[Array, Array]:
    """Newton's method from the middle of the bracket, kept inside it: beta, and the last step's length.

    Where an entry's own 0 or 1 lies at the solution, Newton's method may go to and fro between both sides of it: then
    the secant through the last two points takes its place, and where the sum is flat, bisection.
    """

    def step(_: Array, state: _Iterate) -> _Iterate:
        beta, previous = state.beta, state.previous
        excess, slope = _excess_and_slope(equation, beta)
        near, far = jnp.where(excess >= 0, beta, state.near), jnp.where(excess < 0, beta, state.far)
        steep = slope > 0
        newton = jnp.clip(beta + excess / jnp.where(steep, slope, 1), near, far)
        newton = jnp.where(steep, newton, 0.5 * (near + far))
        between = excess * state.excess < 0
        secant = beta + excess * (previous - beta) / jnp.where(between, excess - state.excess, 1)
        to_and_fro = between & ((newton - beta) * (newton - previous) >= 0)
        return _Iterate(near, far, jnp.where(to_and_fro, secant, newton), beta, excess)

    middle = 0.5 * (near + far)
    state = lax.fori_loop(0, steps, step, _Iterate(near, far, middle, middle, 0 * middle))
    return state.beta, jnp.abs(state.beta - state.previous)


def _excess_and_slope(equation: _Equation, beta: Float[Array, "#a 1 #c"]) -> tuple[Array, Array]:
    """The mask's sum minus k, and how fast it falls with beta."""
    r, axes, kappa = equation.r, equation.axes, equation.kappa
    z = pnorm.unit_clip(equation.above(beta))
    # Of the clipped entries those at 0 have no slope of their own but for p = 2.
    slopes = ((z > 0) & (z < 1)).astype(z.dtype) if r == 1 else jnp.where(z < 1, pnorm.power(z, r - 1), 0)
    slope = r * add_up(slopes, axes)
    if kappa is not None:
        slope = slope * equation.factor(beta) + add_up(pnorm.unit_clip(slopes * z), axes) * kappa / (1 + kappa * beta)
    return _excess(equation, z), slope


def _excess(equation: _Equation, z: Float[Array, "a n c"]) -> Float[Array, "#a 1 #c"]:
    """The mask's sum minus k; in a long sum ones are counted, so that they don't round off what others add."""
    masks = _masks(z, equation.r)
    if len(equation.axes) == 1:
        return add_up(masks, equation.axes) - equation.k
    ones = add_up((z >= 1).astype(z.dtype), equation.axes)
    return (ones - equation.k) + add_up(jnp.where(z >= 1, 0, masks), equation.axes)
