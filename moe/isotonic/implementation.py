"""Which implementation of a top-k solver runs, and what both return.

`None` is decided where a program is lowered, since only then its platform is known. The kernel runs on a TPU where one
device holds the whole batch, be it inside `shard_map`. XLA cannot partition a kernel: where it partitions the program
(jit over a mesh), and on any other platform, the reference runs.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float

from moe.isotonic import pnorm
from moe.isotonic.checks import require

IMPLEMENTATIONS = (None, "xla", "pallas_tpu")
# Larger problems have their code unrolled too far, and a router has none.
LARGEST_N = 256


class Crossing(NamedTuple):
    """The threshold tau of each problem, in parts that do not cancel: x - tau is (x - center) + offset.

    center: x_(k). offset: center - tau >= 0. value: tau. residual: as in `moe.types.Solution`.
    """

    center: Float[Array, "*b"]
    offset: Float[Array, "*b"]
    value: Float[Array, "*b"]
    residual: Float[Array, "*b"]


class Bound(NamedTuple):
    """function(x, strength, **arguments) -> Crossing; equal if all of that is, so that compiled code is found again."""

    function: Callable[..., Crossing]
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, x: Float[Array, "*b n"], strength: Float[Array, ""]) -> Crossing:
        """Find the threshold of every problem along the last axis."""
        return self.function(x, strength, **dict(self.arguments))


def check_implementation(implementation: str | None) -> None:
    """One of the names that solvers know."""
    require(implementation in IMPLEMENTATIONS, "implementation", implementation, f"one of {IMPLEMENTATIONS}")


def refusal(
    x: Float[Array, "*b n"], k: Any, p: float, exponents: tuple[int, ...], magnitude: bool = False
) -> str | None:
    """Why there is no kernel for a problem, or None where there is one. exponents: the 1/(p-1) that it serves."""
    if magnitude:
        return "the TPU kernels serve the mask, not the magnitude"
    if x.shape[-1] > LARGEST_N:
        return f"the TPU kernels serve n <= {LARGEST_N}, not {x.shape[-1]}"
    if x.dtype != jnp.float32:
        return f"the TPU kernels take float32, not {x.dtype}"
    if x.size == 0:
        return "the TPU kernels want at least one problem"
    if not isinstance(k, numbers.Integral):
        return "the TPU kernels need k as a Python integer, not as an array"
    if pnorm.exponent(p) not in exponents:
        return f"this TPU kernel serves p in {tuple(1 + 1 / r for r in exponents)}, not {p}"
    return None


def choose(
    implementation: str | None,
    kernel: Bound,
    reference: Bound,
    refused: str | None,
    x: Float[Array, "*b n"],
    strength: Float[Array, ""],
) -> Crossing:
    """Run the named implementation, or for None the kernel where it can run, and else the reference.

    refused: why there is no kernel for this problem; NotImplementedError if one is asked for by name.
    """
    if implementation == "xla" or (implementation is None and refused):
        return reference(x, strength)
    if refused:
        raise NotImplementedError(f"{refused}: use implementation='xla'")
    if implementation == "pallas_tpu":
        return kernel(x, strength)
    return Crossing(*_either.bind(x, jnp.asarray(strength), kernel=kernel, reference=reference))


_either = Primitive("kernel_or_reference")
_either.multiple_results = True


@_either.def_impl
@functools.partial(jax.jit, static_argnames=("kernel", "reference"))
def _run(x: Array, strength: Array, *, kernel: Bound, reference: Bound) -> Sequence[Array]:
    config: Any = jax.config  # whose fields only the newer jax declares to type checkers
    if config.jax_disable_jit:  # without a lowering there is nothing to choose by
        return reference(x, strength)
    return _either.bind(x, strength, kernel=kernel, reference=reference)


@_either.def_abstract_eval
def _shapes(x: Any, strength: Any, *, kernel: Bound, reference: Bound) -> list[Any]:
    del strength, kernel, reference
    return [x.update(shape=x.shape[:-1], weak_type=False)] * len(Crossing._fields)


def _lower_reference(context: Any, *arguments: Any, kernel: Bound, reference: Bound) -> Any:
    del kernel
    return mlir.lower_fun(reference.__call__, multiple_results=True)(context, *arguments)


def _lower_for_tpu(context: Any, *arguments: Any, kernel: Bound, reference: Bound) -> Any:
    try:
        return mlir.lower_fun(kernel.__call__, multiple_results=True)(context, *arguments)
    except NotImplementedError:  # a program that XLA is to partition
        return _lower_reference(context, *arguments, kernel=kernel, reference=reference)


def _batch(arguments: Sequence[Array], axes: Sequence[int | None], *, kernel: Bound, reference: Bound) -> Any:
    """More problems are more rows, unless the strength differs between them."""
    (x, strength), (x_axis, strength_axis) = arguments, axes
    if strength_axis is None and x_axis is not None:
        found = _either.bind(jnp.moveaxis(x, x_axis, 0), strength, kernel=kernel, reference=reference)
    else:
        found = list(jax.vmap(reference.__call__, axes)(x, strength))
    return found, [0] * len(found)


mlir.register_lowering(_either, _lower_reference)
mlir.register_lowering(_either, _lower_for_tpu, platform="tpu")
batching.primitive_batchers[_either] = _batch
