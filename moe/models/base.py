"""What every model says of itself, and what it returns."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Float, Int

from moe.layers.block import BlocksConfig, RouterOutputs

Batch: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelConfig(BlocksConfig):
    """The blocks of a model; each model adds what stands around them.

    task: what it learns from, see `moe.tasks`. scored: the arrays of an evaluation batch that its scores depend on.
    observed: those that `observe` and `attributes` depend on.
    """

    task: ClassVar[str]
    scored: ClassVar[tuple[str, ...]]
    observed: ClassVar[tuple[str, ...]]

    def train_batch(self, batch_size: int, data: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """What a training batch holds; `data` is the config's."""
        raise NotImplementedError

    def attributes(self, batch: Batch) -> dict[str, tuple[Int[Array, "B L"], int]]:
        """What experts may specialise in: by name, a number of every token of an evaluation batch, below the second."""
        raise NotImplementedError

    @property
    def moe_blocks(self) -> range:
        """The blocks that have experts."""
        every = self.moe_every
        return range(self.dense_layers + every - 1, self.depth, every) if every else range(0)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the loss of a target is; loss and label_smoothing are those of `moe.config.Config`."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0


class ModelOutput(NamedTuple):
    """What a model's call returns.

    logits: float32, one score per class or word. routers, rms: see `moe.layers.block.BlocksOutput`.
    """

    logits: Float[Array, "*B V"]
    routers: RouterOutputs
    rms: Float[Array, "N"]


class LossOutput(NamedTuple):
    """Sums over the terms of a batch (images, or tokens with a target), to be divided by their number.

    loss: to be minimised, without the routers' losses. scalars: its parts and measures, by name. routers, rms: no sums,
    see `moe.layers.block.BlocksOutput`.
    """

    loss: Float[Array, ""]
    scalars: dict[str, Float[Array, ""]]
    routers: RouterOutputs
    rms: Float[Array, "N"]
