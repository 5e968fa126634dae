"""Tiles of tokens in which one entry of 1024 tokens fills one vector register: no work across sublanes or lanes.

A register of a TPU holds 8 sublanes of 128 lanes. XLA keeps a [T, n] array whose n is no multiple of 128 with its
tokens along lanes, as registers of 8 entries by 128 tokens. So the layout of a staged tile, [groups of 8 entries, 8
sublanes per 128 tokens, lanes], is the same memory and costs nothing. One entry of 1024 tokens is then every eighth
sublane, which a strided load brings into one register. Where n is a multiple of 128, XLA keeps entries along lanes,
and the kernel transposes its tile on the way in and out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

SUBLANES = 8
LANES = 128
# Small problems take several registers per entry, so that independent work hides latencies.
_REGISTERS = 32
_MOST_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How T problems of n entries are cut into tiles of rows x 128 problems, `rows` a multiple of 8.

    batch, n: the shape of the input. rows: sublanes that one entry of a tile fills.
    """

    batch: tuple[int, ...]
    n: int
    rows: int

    @classmethod
    def of(cls, x: Float[Array, "*b n"]) -> "Tiling":
        """Tiles as large as registers allow and the number of problems can use."""
        *batch, n = x.shape
        rows = min(SUBLANES * max(1, _REGISTERS // n), _MOST_ROWS)
        used = -(-math.prod(batch) // (SUBLANES * LANES)) * SUBLANES
        return cls(tuple(batch), n, min(rows, used))

    @property
    def problems(self) -> int:
        """T, over all axes of the batch."""
        return math.prod(self.batch)

    @property
    def transposes(self) -> bool:
        """Whether entries lie along lanes in memory, so that the kernel has to transpose."""
        return self.n % LANES == 0

    @property
    def tiles(self) -> int:
        """Number of tiles; the last one is padded."""
        return -(-self.problems // (self.rows * LANES))

    @property
    def entry(self) -> tuple[int, int]:
        """Shape of one entry of a tile, or of one number per problem."""
        return self.rows, LANES

    @property
    def staged(self) -> tuple[int, int, int]:
        """Shape of a tile as `load` and `store` see it."""
        return -(-self.n // SUBLANES), self.rows * SUBLANES, LANES

    def wrap(self, x: Float[Array, "*b n"]) -> Float[Array, "..."]:
        """The array as the kernel reads it, padded to whole tiles."""
        x = x.reshape(self.problems, self.n).astype(jnp.float32)
        problems = self.tiles * self.rows * LANES
        if self.transposes:
            return jnp.pad(x, ((0, problems - self.problems), (0, 0)))
        groups, _, _ = self.staged
        padded = jnp.pad(x.T, ((0, groups * SUBLANES - self.n), (0, problems - self.problems)))
        split = padded.reshape(groups, SUBLANES, problems // LANES, LANES)
        return split.transpose(0, 2, 1, 3).reshape(groups, -1, LANES)

    def unwrap(self, y: Float[Array, "..."]) -> Float[Array, "*b n"]:
        """Undo `wrap`."""
        if not self.transposes:
            groups = y.shape[0]
            split = y.reshape(groups, -1, SUBLANES, LANES).transpose(0, 2, 1, 3)
            y = split.reshape(groups * SUBLANES, -1)[: self.n].T
        return y[: self.problems].reshape(*self.batch, self.n)

    def unwrap_scalars(self, y: Float[Array, "rows lanes"]) -> Float[Array, "*b"]:
        """One number per problem, without the padding."""
        return y.reshape(-1)[: self.problems].reshape(self.batch)

    def load(self, staged: Any, index: int) -> Float[Array, "rows lanes"]:
        """One entry of all problems of the tile."""
        return staged.at[index // SUBLANES][pl.ds(index % SUBLANES, self.rows, stride=SUBLANES), :]

    def store(self, staged: Any, index: int, value: Float[Array, "rows lanes"]) -> None:
        """Write one entry of all problems of the tile."""
        staged.at[index // SUBLANES][pl.ds(index % SUBLANES, self.rows, stride=SUBLANES), :] = value

    def stage(self, block: Any, scratch: Sequence[Any]) -> Any:
        """The tile in the layout of `load`: the block itself, or its transpose in scratch memory."""
        if not self.transposes:
            return block
        (staged,) = scratch
        for row in range(self.rows):
            problems = pl.ds(row * LANES, LANES)
            for first in range(0, self.n, LANES):
                entries = block[problems, pl.ds(first, LANES)].T
                for offset in range(0, LANES, SUBLANES):
                    group = (first + offset) // SUBLANES
                    staged.at[group][pl.ds(row * SUBLANES, SUBLANES), :] = entries[offset : offset + SUBLANES]
        return staged

    def unstage(self, staged: Any, block: Any) -> None:
        """Write a staged tile to the block, unless it is the block."""
        if not self.transposes:
            return
        for row in range(self.rows):
            problems = pl.ds(row * LANES, LANES)
            for first in range(0, self.n, LANES):
                groups = range(first // SUBLANES, (first + LANES) // SUBLANES)
                entries = [staged.at[group][pl.ds(row * SUBLANES, SUBLANES), :] for group in groups]
                block[problems, pl.ds(first, LANES)] = jnp.concatenate(entries).T

    def run(
        self,
        kernel: Callable[..., None],
        x: Float[Array, "*b n"],
        strength: Float[Array, ""],
        *,
        arrays: int,
        scalars: int,
        scratch: Sequence[Any],
        name: str,
        interpret: Any,
    ) -> list[Array]:
        """Call kernel(1 / strength, x, array outputs, scalar outputs, staging, scratch) on every tile.

        arrays, scalars: how many outputs of n numbers and of one number per problem the kernel writes.
        """
        wrapped = self.wrap(x)
        if self.transposes:
            block = pl.BlockSpec((self.rows * LANES, self.n), lambda tile: (tile, 0))
        else:
            block = pl.BlockSpec(self.staged, lambda tile: (0, tile, 0))
        scalar = pl.BlockSpec(self.entry, lambda tile: (tile, 0))
        # Inside shard_map, outputs vary over the mesh as the input does.
        output = functools.partial(
            jax.ShapeDtypeStruct, dtype=jnp.float32, manual_axis_type=jax.typeof(wrapped).manual_axis_type
        )
        staging = [pltpu.VMEM(self.staged, jnp.float32)] * (1 + arrays if self.transposes else 0)
        outputs = pl.pallas_call(
            kernel,
            grid=(self.tiles,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block],
            out_specs=[block] * arrays + [scalar] * scalars,
            out_shape=[output(wrapped.shape)] * arrays + [output((self.tiles * self.rows, LANES))] * scalars,
            scratch_shapes=[*scratch, *staging],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            interpret=interpret,
            name=name,
        )((1 / strength).reshape(1), wrapped)
        return [self.unwrap(y) for y in outputs[:arrays]] + [self.unwrap_scalars(y) for y in outputs[arrays:]]
