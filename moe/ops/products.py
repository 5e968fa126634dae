"""What an expert's network is made of, for experts side by side and for rows sorted by expert.

product(x, w): x times the matrix of each row's expert, in x's dtype, sums in float32. product.elementwise(function,
*arrays): function(*arrays), of arrays that products returned. product.feed_forward(x, first, last, function): both
layers of a network, function(x w for each w of `first`) `last`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.ops.feed_forward import feed_forward
from moe.ops.grouped_matmul import grouped_matmul
from moe.ops.rowwise import map_rows


class Batched:
    """Every expert, or a dense network, with rows of its own."""

    def __call__(self, x: Float[Array, "*e n X"], w: Float[Array, "*e X Y"]) -> Float[Array, "*e n Y"]:
        return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)

    def elementwise(self, function: Callable[..., Array], *arrays: Array) -> Array:
        """function(*arrays)."""
        return function(*arrays)

    def feed_forward(
        self, x: Float[Array, "*e n X"], first: Sequence[Array], last: Array, function: Callable[..., Array]
    ) -> Float[Array, "*e n Y"]:
        """function(x w for each w of `first`) `last`."""
        return _by_layer(self, x, first, last, function)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """`moe.ops.grouped_matmul` on rows in groups of these sizes. Rows past the last group are of no meaning."""

    sizes_E: Int[Array, "E"]
    block: int
    implementation: str | None

    def __call__(self, x: Float[Array, "N X"], w: Float[Array, "E X Y"]) -> Float[Array, "N Y"]:
        return grouped_matmul(x, w, self.sizes_E, block=self.block, implementation=self.implementation, clean=False)

    def elementwise(self, function: Callable[..., Array], *arrays: Float[Array, "N X"]) -> Float[Array, "N X"]:
        """function(*arrays); on TPU of the rows in use alone, where there may be room for many more."""
        if self.implementation == "megablox":
            return map_rows(function, arrays, jnp.sum(self.sizes_E))
        return function(*arrays)

    def feed_forward(
        self, x: Float[Array, "N X"], first: Sequence[Array], last: Array, function: Callable[..., Array]
    ) -> Float[Array, "N Y"]:
        """function(x w for each w of `first`) `last`; in one loop over blocks where there are blocks."""
        if self.implementation == "blocks":
            return feed_forward(x, tuple(first), last, self.sizes_E, function)
        return _by_layer(self, x, first, last, function)


Product: TypeAlias = Batched | Grouped


def _by_layer(product: Product, x: Array, first: Sequence[Array], last: Array, function: Callable[..., Array]) -> Array:
    return product(product.elementwise(function, *(product(x, w) for w in first)), last)


BATCHED = Batched()
