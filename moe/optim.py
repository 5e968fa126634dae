"""The optimizer: AdamW under a warm-up and cosine schedule, with the gradient's global norm clipped."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from moe.types import PyTree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) under a schedule.

    learning_rate: at its peak, after `warmup_steps` of linear growth from 0; it then falls along a half cosine to
        `final_fraction` of the peak at the last step.
    weight_decay: times the learning rate; on matrices only, not on norms, biases and positions.
    b1, b2: decay of the means of the gradient and of its square, in [0, 1).
    clip_norm: largest global norm of the gradient; 0: no limit.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.0
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "warmup_steps", "final_fraction", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)} must not be negative.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)} must lie in [0, 1).")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step. Raises ValueError if the warm-up is longer than the run."""
    if config.warmup_steps >= steps:
        raise ValueError(f"optimizer.warmup_steps = {config.warmup_steps} must be below steps = {steps}.")
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW on the schedule of `steps` steps."""
    adamw = optax.adamw(
        make_schedule(config, steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_is_matrix
    )
    return optax.chain(_clip(config.clip_norm), adamw) if config.clip_norm else adamw


def _clip(limit: float) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`, but by one factor, which XLA multiplies where the gradient is used.

    A quotient of every entry it would keep, an array as large as the gradient.
    """

    def update(gradient: PyTree, _: PyTree) -> PyTree:
        factor = limit / jnp.maximum(optax.tree.norm(gradient), limit)
        return jax.tree.map(lambda x: x * factor, gradient)

    return optax.stateless(update)


def _is_matrix(params: PyTree) -> PyTree:
    # By name, since stacking over layers gives a norm's scale two axes as well; a list of layers adds none.
    def one(path: tuple, _: jax.Array) -> bool:
        name = next(str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey))
        return name not in ("scale", "position") and not name.startswith("bias")

    return jax.tree_util.tree_map_with_path(one, params)
