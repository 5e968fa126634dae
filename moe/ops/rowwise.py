"""Elementwise functions of the rows in use of arrays with room for more, on TPU."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

# Rows and columns of a tile at most: tens of tiles fit into the vector memory of 16 MiB that a kernel is given.
_TILE = (128, 2048)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def map_rows(
    function: Callable[..., Array],
    arrays: tuple[Float[Array, "N X"], ...],
    num_rows: Int[Array, ""],
    interpret: Any = False,
) -> Float[Array, "N X"]:
    """function(*arrays), elementwise, of the first `num_rows` rows; the others are of no meaning, also in gradients.

    Computed in float32, in the arrays' dtype. Costs the rows in use, in whole tiles, by a grid that is known when the
    program runs. interpret: runs on any machine, slowly; otherwise for TPUs.
    """
    return _run(lambda *tiles: (function(*tiles),), arrays, num_rows, 1, interpret)[0]


def _forward(function: Callable[..., Array], arrays: tuple[Array, ...], num_rows: Array, interpret: Any) -> Any:
    return map_rows(function, arrays, num_rows, interpret), (arrays, num_rows)


def _backward(function: Callable[..., Array], interpret: Any, saved: Any, dy: Array) -> tuple[tuple[Array, ...], None]:
    arrays, num_rows = saved

    def gradients(*tiles: Array) -> tuple[Array, ...]:
        *inputs, dy = tiles
        return jax.vjp(function, *inputs)[1](dy)

    # In place of what they are the gradients of, which nothing needs any more.
    return tuple(_run(gradients, (*arrays, dy), num_rows, len(arrays), interpret, in_place=True)), None


map_rows.defvjp(_forward, _backward)


def _run(
    function: Callable[..., tuple[Array, ...]],
    arrays: tuple[Array, ...],
    num_rows: Array,
    outputs: int,
    interpret: Any,
    *,
    in_place: bool = False,
) -> Sequence[Array]:
    """`outputs` arrays like the first; in_place: where the first ones were."""

    def kernel(*refs: Any) -> None:
        inputs, results = refs[: len(arrays)], refs[len(arrays) :]
        tiles = function(*(ref[...].astype(jnp.float32) for ref in inputs))
        for ref, tile in zip(results, tiles, strict=True):
            ref[...] = tile.astype(ref.dtype)

    rows, columns = arrays[0].shape
    tile = (math.gcd(rows, _TILE[0]), min(columns, _TILE[1]))
    spec = pl.BlockSpec(tile, lambda row, column: (row, column))
    like = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_rows, tile[0]), pl.cdiv(columns, tile[1])),
        in_specs=[spec] * len(arrays),
        out_specs=[spec] * outputs,
        out_shape=[like] * outputs,
        input_output_aliases={index: index for index in range(outputs)} if in_place else {},
        interpret=interpret,
        name="map_rows",
    )(*arrays)
