"""Vision transformer with mixture-of-experts blocks (V-MoE, Riquelme et al. 2021, arXiv 2106.05974)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from moe.layers.block import Blocks, BlocksOutput
from moe.layers.moe import MoeConfig
from moe.layers.norm import make_norm
from moe.layers.param import axes, matrix
from moe.models.base import Batch, LossOutput, ModelConfig, ModelOutput, Objective
from moe.parallel.mesh import constrain_batch
from moe.routers.base import Router
from moe.types import Look, PyTree


@dataclasses.dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """The blocks, with the fields of `moe.layers.block.BlocksConfig`, and what stands around them.

    image_size: [height, width, channels] of an image. patch_size: pixels along the side of a square patch.
    num_classes: width of the head.
    pooling: what the head sees: the "mean" over the tokens, or a "class_token" that stands before the patches and is
        routed as they are.
    representation_width: width of a layer with tanh before the head; 0: there is none.
    head_bias: the head's biases at first; -log(num_classes) starts a sigmoid loss at a rate of one class in all.
    """

    task = "image"
    scored = ("image", "mask")
    observed = ("image", "mask", "label")

    image_size: tuple[int, ...] = (8, 8, 1)
    patch_size: int = 2
    num_classes: int = 10
    pooling: Literal["mean", "class_token"] = "mean"
    representation_width: int = 0
    head_bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)} must be at least 1.")
        if len(self.image_size) != 3 or min(self.image_size) < 1:
            raise ValueError(f"model.image_size = {self.image_size} must be height, width and channels, none below 1.")
        if any(side % self.patch_size for side in self.image_size[:2]):
            raise ValueError(
                f"model.patch_size = {self.patch_size} must divide the sides of model.image_size = {self.image_size}."
            )
        if self.representation_width < 0:
            raise ValueError(f"model.representation_width = {self.representation_width} must not be negative.")

    def train_batch(self, batch_size: int, data: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """What a training batch holds."""
        return {
            "image": jax.ShapeDtypeStruct((batch_size, *self.image_size), jnp.float32),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }

    def attributes(self, batch: Batch) -> dict[str, tuple[Int[Array, "B L"], int]]:
        """See `ModelConfig`: the class of a token's image, and its place there."""
        shape = (len(batch["label"]), self.length)
        class_BL = jnp.broadcast_to(batch["label"][:, None], shape)
        position_BL = jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32)[None], shape)
        return {"class": (class_BL, self.num_classes), "position": (position_BL, self.length)}

    @property
    def length(self) -> int:
        """Tokens per image."""
        patches = (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)
        return patches + (self.pooling == "class_token")


class VisionTransformer(nnx.Module):
    """Patches, learned positions, pre-norm blocks, mean over tokens or a class token, linear head.

    The class token is nothing but its position: V-MoE adds a second vector to that, for the same function.
    """

    def __init__(self, config: ViTConfig, moe: MoeConfig, router: Router, *, key: jax.Array) -> None:
        self.config = config
        key_patch, key_position, key_blocks, key_norm, key_head = jax.random.split(key, 5)
        pixels = config.patch_size**2 * config.image_size[2]
        self.w_patch = matrix(key_patch, (pixels, config.width), (None, "embed"), fan_in=pixels)
        # As large as the patches' own embeddings, so that position counts from the first step.
        position = 0.5 * jax.random.normal(key_position, (config.length, config.width))
        self.position = nnx.Param(position, axes=(None, "embed"))
        self.blocks = Blocks(config, moe, router, key=key_blocks)
        self.norm = make_norm(config.width, config.dtype, config.rms_eps, key_norm)
        if config.representation_width:
            shape = (config.width, config.representation_width)
            self.w_representation = matrix(jax.random.fold_in(key_head, 1), shape, ("embed", None), fan_in=config.width)
        self.head = nnx.Linear(
            config.representation_width or config.width,
            config.num_classes,
            kernel_init=nnx.initializers.zeros_init(),
            bias_init=nnx.initializers.constant(config.head_bias),
            kernel_metadata=axes("embed", None),
            bias_metadata=axes(None),
            rngs=nnx.Rngs(key_head),
        )

    def __call__(
        self,
        image: Float[Array, "B h w c"],
        *,
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        mask: Bool[Array, "B"] | None = None,
        look: Look | None = None,
    ) -> ModelOutput:
        """Classifies the images; keys are given in training only, one per image; see `Moe` for mask and look."""
        hidden_BD, blocks = self._hidden(image, keys, mesh, mask, look)
        return ModelOutput(self.head(hidden_BD), blocks.routers, blocks.rms)

    def _hidden(
        self,
        image: Float[Array, "B h w c"],
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        mask: Bool[Array, "B"] | None,
        look: Look | None = None,
    ) -> tuple[Float[Array, "B D"], BlocksOutput]:
        """What the head sees of each image, and what the blocks return."""
        if image.shape[1:] != tuple(self.config.image_size):
            raise ValueError(
                f"images of shape {image.shape[1:]} don't fit model.image_size = {self.config.image_size}."
            )
        dtype = jnp.dtype(self.config.dtype)
        patch_BLp = patches(image, self.config.patch_size).astype(dtype)
        x_BLD = jnp.einsum("BLp,pD->BLD", patch_BLp, self.w_patch[...].astype(dtype))
        if self.config.pooling == "class_token":
            x_BLD = jnp.pad(x_BLD, ((0, 0), (1, 0), (0, 0)))
        x_BLD = constrain_batch(x_BLD + self.position[...].astype(dtype)[None], mesh)
        blocks = self.blocks(x_BLD, keys, mesh, mask, look=look)
        x_BLD = blocks.x
        if self.config.pooling == "class_token":
            pooled_BD = self.norm(x_BLD[:, 0]).astype(jnp.float32)
        else:
            pooled_BD = jnp.mean(self.norm(x_BLD), axis=1, dtype=jnp.float32)
        if self.config.representation_width:
            pooled_BD = jnp.tanh(pooled_BD @ self.w_representation[...])
        return pooled_BD, blocks

    def loss(self, batch: Batch, *, keys: Key[Array, "B"] | None, mesh: Mesh, objective: Objective) -> LossOutput:
        """Sums over the images: cross-entropy of the smoothed label, and the number of right answers."""
        output = self(batch["image"], keys=keys, mesh=mesh)
        targets = optax.smooth_labels(
            jax.nn.one_hot(batch["label"], self.config.num_classes), objective.label_smoothing
        )
        if objective.loss == "sigmoid":
            cross_entropy = jnp.sum(optax.sigmoid_binary_cross_entropy(output.logits, targets))
        else:
            cross_entropy = jnp.sum(optax.softmax_cross_entropy(output.logits, targets))
        correct = jnp.sum(jnp.argmax(output.logits, axis=-1) == batch["label"], dtype=jnp.float32)
        scalars = {"cross_entropy": cross_entropy, "accuracy": correct}
        return LossOutput(cross_entropy, scalars, output.routers, output.rms)

    @staticmethod
    def terms(batch: Batch) -> float:
        """How many terms a batch's loss sums up: its images."""
        return float(len(batch["label"]))

    def score(self, batch: Batch, *, mesh: Mesh) -> Float[Array, "B V"]:
        """The logits, dropping nothing; rows that the mask marks False are padding."""
        return self(batch["image"], keys=None, mesh=mesh, mask=batch["mask"]).logits

    def features(self, batch: Batch, *, mesh: Mesh) -> Float[Array, "B D"]:
        """What the head sees, as `score` computes it."""
        return self._hidden(batch["image"], None, mesh, batch["mask"])[0]

    def observe(self, batch: Batch, *, mesh: Mesh, look: Look) -> PyTree:
        """What `look` makes of each MoE layer's routing as `score` runs, stacked over the layers."""
        return self(batch["image"], keys=None, mesh=mesh, mask=batch["mask"], look=look).routers.observed


def patches(image: Float[Array, "B h w c"], size: int) -> Float[Array, "B L p"]:
    """Cuts images into squares of `size` pixels, row by row, and flattens each."""
    batch, height, width, channels = image.shape
    grid = image.reshape(batch, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
