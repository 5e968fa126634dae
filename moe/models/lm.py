"""Decoder language model with mixture-of-experts blocks, as Mixtral (arXiv 2401.04088) and OLMoE (2409.02060) are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from moe.layers.attention import AttentionBias, AttentionConfig, Context, QkNorm
from moe.layers.block import Blocks, BlocksOutput, Caches
from moe.layers.mlp import Activation
from moe.layers.moe import MoeConfig
from moe.layers.norm import make_norm
from moe.layers.param import matrix
from moe.models.base import Batch, LossOutput, ModelConfig, ModelOutput, Objective
from moe.ops.attention import Places
from moe.ops.rope import RopeScaling, Unscaled, rotation
from moe.ops.vocabulary import Scores, Sums, VocabularyLoss, vocabulary_logits, vocabulary_loss, vocabulary_scores
from moe.parallel.mesh import BATCH_AXES, batch_shards, constrain_batch
from moe.routers.base import Router
from moe.types import Look, PyTree


@dataclasses.dataclass(frozen=True)
class LmConfig(ModelConfig):
    """The blocks, with the fields of `moe.layers.block.BlocksConfig`, and what stands around them.

    vocab_size: V. length: tokens that the model reads at most. activation: see `BlocksConfig`.
    kv_heads: of keys and values; 0: as many as heads. head_width: 0: width / heads.
    window: tokens that a token sees, itself included; 0: all before it. attention_cap: bound of the scores; 0: none.
    rope_theta, rope_scaling: rotary positions, see `moe.ops.rope`. qk_norm, attention_bias: see `AttentionConfig`.
    norm_eps: ε of every RMSNorm. tied_head: the head is the embedding, transposed.
    logit_cap: logits become cap · tanh(logit / cap); 0: they don't (Gemma 2, arXiv 2408.00118).
    z_weight: of log(Σ exp(logit))² over the vocabulary. loss_chunk: positions of each sequence whose logits exist at
        once.
    """

    task = "text"
    scored = ("tokens", "targets", "segment", "position", "mask")
    observed = scored

    activation: Activation = "swiglu"
    vocab_size: int = 257
    length: int = 256
    kv_heads: int = 0
    head_width: int = 0
    window: int = 0
    attention_cap: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = Unscaled()
    qk_norm: QkNorm = "none"
    attention_bias: AttentionBias = "none"
    norm_eps: float = 1e-6
    tied_head: bool = False
    logit_cap: float = 0.0
    z_weight: float = 0.0
    loss_chunk: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "length", "loss_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)} must be at least 1.")
        for name in ("kv_heads", "head_width", "window", "attention_cap", "logit_cap", "z_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} = {getattr(self, name)} must not be negative.")
        if self.norm_eps <= 0 or self.rope_theta <= 1:
            raise ValueError(
                f"model.norm_eps = {self.norm_eps} must be positive, and model.rope_theta = {self.rope_theta} above 1."
            )
        if self.heads % self.attention.kv_heads:
            raise ValueError(f"model.kv_heads = {self.kv_heads} must divide model.heads = {self.heads}.")
        if self.attention.head_width % 2:
            raise ValueError(
                f"heads of an odd width, {self.attention.head_width}, can't be rotated: choose an even "
                "model.head_width."
            )

    @property
    def attention(self) -> AttentionConfig:
        """Settings of every attention layer. Raises ValueError where the heads don't fit the width."""
        return AttentionConfig(
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_width=self.head_width or super().attention.head_width,
            window=self.window,
            cap=self.attention_cap,
            qk_norm=self.qk_norm,
            bias=self.attention_bias,
            norm_eps=self.norm_eps,
        )

    @property
    def rms_eps(self) -> float:
        """See `BlocksConfig`."""
        return self.norm_eps

    def train_batch(self, batch_size: int, data: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """What a training batch holds, each [B, L], L being `data.length`.

        tokens; targets, the tokens that follow; segment, the number of a token's document in its row from 1 on, or 0
        for padding; position in the document; loss_mask, False for targets that don't count.
        """
        shape = (batch_size, data.length)
        integers = ("tokens", "targets", "segment", "position")
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in integers}
        return batch | {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.bool_)}

    def attributes(self, batch: Batch) -> dict[str, tuple[Int[Array, "B L"], int]]:
        """See `ModelConfig`: a token's id, and its position in the row's document."""
        return {"token": (batch["tokens"], self.vocab_size), "position": (batch["position"], self.length)}


class LanguageModel(nnx.Module):
    """Embedding, pre-norm decoder blocks, norm, linear head."""

    def __init__(self, config: LmConfig, moe: MoeConfig, router: Router, *, key: jax.Array) -> None:
        self.config = config
        key_embedding, key_blocks, key_norm, key_head = jax.random.split(key, 4)
        # Small enough to serve as head as well.
        self.embedding = matrix(
            key_embedding, (config.vocab_size, config.width), ("vocab", "embed"), fan_in=config.width
        )
        self.blocks = Blocks(config, moe, router, key=key_blocks)
        self.norm = make_norm(config.width, config.dtype, config.rms_eps, key_norm)
        if not config.tied_head:
            self.head = matrix(key_head, (config.width, config.vocab_size), ("embed", "vocab"), fan_in=config.width)

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        *,
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        position_BL: Int[Array, "B L"] | None = None,
        segment_BL: Int[Array, "B L"] | None = None,
    ) -> ModelOutput:
        """The logits of every token's successor; each row is one document unless segments and positions say more.

        keys are given in training only, one per row. Segment 0 is padding. Raises ValueError for more tokens than
        model.length.
        """
        hidden = self._hidden(tokens_BL, position_BL, segment_BL, keys, mesh)
        logits = vocabulary_logits(hidden.x, self._head(), self.config.logit_cap)
        return ModelOutput(logits, hidden.routers, hidden.rms)

    def loss(self, batch: Batch, *, keys: Key[Array, "B"] | None, mesh: Mesh, objective: Objective) -> LossOutput:
        """Sums over the tokens that loss_mask keeps: cross-entropy in nats, weighted z loss, right answers.

        Raises ValueError for another objective than softmax.
        """
        if objective.loss != "softmax":
            raise ValueError(f"loss = '{objective.loss}' is for images with several labels: language needs 'softmax'.")
        hidden = self._hidden(batch["tokens"], batch["position"], batch["segment"], keys, mesh)
        settings = self._loss_settings(objective.label_smoothing)
        sums = _summed_loss(hidden.x, self._head(), batch["targets"], batch["loss_mask"], settings, mesh)
        scalars = {"cross_entropy": sums.cross_entropy, "accuracy": sums.correct}
        scalars |= {"z": sums.z} if self.config.z_weight else {}
        return LossOutput(sums.loss, scalars, hidden.routers, hidden.rms)

    @staticmethod
    def terms(batch: Batch) -> Float[Array, ""]:
        """How many terms a batch's loss sums up: the targets that count; 1 where there is none."""
        return jnp.maximum(jnp.sum(batch["loss_mask"], dtype=jnp.float32), 1.0)

    def score(self, batch: Batch, *, mesh: Mesh) -> Scores:
        """The loss of every target and whether it is the likeliest; rows that the mask marks False are padding."""
        hidden = self._evaluated(batch, mesh)
        return vocabulary_scores(hidden.x, self._head(), batch["targets"], self._loss_settings(0.0))

    def observe(self, batch: Batch, *, mesh: Mesh, look: Look) -> PyTree:
        """What `look` makes of each MoE layer's routing as `score` runs, stacked over the layers."""
        return self._evaluated(batch, mesh, look).routers.observed

    def _evaluated(self, batch: Batch, mesh: Mesh, look: Look | None = None) -> BlocksOutput:
        segment_BL = jnp.where(batch["mask"][:, None], batch["segment"], 0)
        return self._hidden(batch["tokens"], batch["position"], segment_BL, None, mesh, look=look)

    def decode(
        self,
        tokens_BL: Int[Array, "B L"],
        position_BL: Int[Array, "B L"],
        mask_BL: Bool[Array, "B L"],
        caches: Caches,
        *,
        mesh: Mesh,
    ) -> tuple[Float[Array, "B V"], Caches]:
        """Logits after the last token of each row that the mask keeps, and the caches with these tokens.

        The tokens go on from those that the caches hold (see `make_caches`), at the positions given.
        """
        hidden = self._hidden(tokens_BL, position_BL, mask_BL.astype(jnp.int32), None, mesh, caches)
        last_B = jnp.maximum(jnp.sum(mask_BL, axis=1) - 1, 0)
        last_BD = jnp.take_along_axis(hidden.x, last_B[:, None, None], axis=1)[:, 0]
        return vocabulary_logits(last_BD, self._head(), self.config.logit_cap), hidden.caches

    def make_caches(self, batch: int, length: int) -> Caches:
        """Empty caches for `batch` sequences of up to `length` tokens."""
        return self.blocks.make_caches(batch, length)

    def _hidden(
        self,
        tokens_BL: Int[Array, "B L"],
        position_BL: Int[Array, "B L"] | None,
        segment_BL: Int[Array, "B L"] | None,
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        caches: Caches | None = None,
        look: Look | None = None,
    ) -> BlocksOutput:
        """The normed output of the last block, and what else the blocks return."""
        length = tokens_BL.shape[1]
        if length > self.config.length:
            raise ValueError(f"a sequence of {length} tokens exceeds model.length = {self.config.length}.")
        if position_BL is None:
            position_BL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens_BL.shape)
        if segment_BL is None:
            segment_BL = jnp.ones(tokens_BL.shape, jnp.int32)
        width = self.config.attention.head_width
        cos_BLd, sin_BLd = rotation(position_BL, width, self.config.rope_theta, self.config.rope_scaling)
        context = Context(tokens_BL, Places(position_BL, segment_BL), cos_BLd, sin_BLd, segment_BL > 0)
        # The rows and not the table become the activations' type, so that its gradient adds up in float32.
        x_BLD = constrain_batch(self.embedding[...][tokens_BL].astype(jnp.dtype(self.config.dtype)), mesh)
        blocks = self.blocks(x_BLD, keys, mesh, None, context, caches, look)
        return blocks._replace(x=self.norm(blocks.x))

    def _head(self) -> Float[Array, "D V"]:
        return self.embedding[...].T if self.config.tied_head else self.head[...]

    def _loss_settings(self, label_smoothing: float) -> VocabularyLoss:
        config = self.config
        return VocabularyLoss(config.loss_chunk, config.logit_cap, label_smoothing, config.z_weight)


def _summed_loss(
    x_BLD: Float[Array, "B L D"],
    head_DV: Float[Array, "D V"],
    target_BL: Int[Array, "B L"],
    mask_BL: Bool[Array, "B L"],
    settings: VocabularyLoss,
    mesh: Mesh,
) -> Sums:
    """`vocabulary_loss` of all devices' rows.

    Each device adds up its own rows' gradient of the head over all chunks before the devices' are summed; left to the
    partitioner, as are rows that don't deal out evenly, they would be for every chunk. The vocabulary may be cut along
    the tensor axis, which stays the partitioner's.
    """
    shards = batch_shards(mesh)
    # All rows on one device, or on one for each piece of the tensor axis: XLA refuses a sum over such batch axes.
    if shards == 1 or x_BLD.shape[0] % shards:
        return vocabulary_loss(x_BLD, head_DV, target_BL, mask_BL, settings)

    def local(head: Array, x: Array, target: Array, mask: Array) -> Sums:
        whole = jax.lax.all_gather(head, "fsdp", axis=0, tiled=True)
        sums = vocabulary_loss(x, whole, target, mask, settings)
        return jax.tree.map(lambda part: jax.lax.psum(part, BATCH_AXES), sums)

    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec("fsdp"), rows, rows, rows),
        out_specs=PartitionSpec(),
        axis_names=set(BATCH_AXES),
    )(head_DV, x_BLD, target_BL, mask_BL)
