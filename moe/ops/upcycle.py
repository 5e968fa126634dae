"""Experts made of a dense model's MLP: sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

MATRICES = ("w_in", "w_gate", "w_out")


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """How experts are made of an MLP with F hidden units, or of another number of experts.

    method: "copy": every expert is the whole MLP. "split": expert e has the units of piece e mod G of G = F /
        expert_width (He et al. 2024, 2410.07524); G neighbours hold every unit once, a virtual group, and start with
        one gate column in common, so that a token chooses whole groups. k must be a multiple of G.
    noise: standard deviation of the noise added to every entry of an expert, over that of the expert's matrix.
    drop: share of an expert's hidden units that are drawn anew, each expert its own, from normal distributions with the
        mean and standard deviation of the entries that they replace, for each matrix (Drop-Upcycling, Nakamura et al.
        2025, 2502.19261, section 3; there .5 was best).
    output_scale: factor of every w_out, on top of the G of a split. With 1 and neither noise nor drop, a layer whose
        combine weights add up to 1 computes the MLP's function; if they add up to s, it is 1 / s that does.
    """

    method: Literal["copy", "split"] = "copy"
    noise: float = 0.0
    drop: float = 0.0
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.noise >= 0:
            raise ValueError(f"upcycle.noise = {self.noise} must not be negative.")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"upcycle.drop = {self.drop} must lie in [0, 1].")
        if not self.output_scale > 0:
            raise ValueError(f"upcycle.output_scale = {self.output_scale} must be positive.")


def granularity(config: UpcycleConfig, hidden: int, expert_width: int, num_experts: int, k: int | None) -> int:
    """G: the pieces that an MLP of `hidden` units is split into; 1 for copies.

    Raises ValueError where widths, experts and k (None: no fixed number) don't fit.
    """
    if config.method == "copy":
        if hidden != expert_width:
            raise ValueError(
                f"moe.expert_width = {expert_width} must be {hidden}, the width of the MLP to copy; to share its units "
                "among narrower experts, set upcycle.method = 'split'."
            )
        return 1
    pieces, rest = divmod(hidden, expert_width)
    if rest or not pieces:
        raise ValueError(f"moe.expert_width = {expert_width} must divide {hidden}, the width of the MLP to split.")
    if num_experts % pieces:
        raise ValueError(
            f"moe.num_experts = {num_experts} must be a multiple of {pieces}, the pieces of an MLP of {hidden} units "
            f"in experts of {expert_width}."
        )
    if k is not None and k % pieces:
        raise ValueError(
            f"router.k = {k} must be a multiple of {pieces}, the pieces of an MLP of {hidden} units in experts of "
            f"{expert_width}, for a token to have all of them."
        )
    return pieces


def to_experts(weights_n: Float[Array, "n a b"], name: str, num_experts: int, pieces: int) -> Float[Array, "n E a2 b2"]:
    """Expert e of each layer: the units of piece e mod `pieces` of w_in, w_gate [D, F] or w_out [F, D].

    w_out is multiplied by `pieces`, since the experts that share out an MLP also share a combine weight.
    """
    axis = _unit_axis(name) + weights_n.ndim
    split = weights_n.reshape(*weights_n.shape[:axis], pieces, -1, *weights_n.shape[axis + 1 :])
    experts = jnp.take(jnp.moveaxis(split, axis, 1), jnp.arange(num_experts) % pieces, axis=1)
    return experts * pieces if name == "w_out" else experts


def alter(
    experts_nE: Float[Array, "n E a b"],
    name: str,
    config: UpcycleConfig,
    layers: Int[Array, "n"],
    key: Key[Array, ""],
) -> Float[Array, "n E a b"]:
    """Applies noise, drop and output_scale to a matrix of every expert; `name` as in `to_experts`.

    What is drawn depends on key, name, layer and expert alone; the units dropped are the same for an expert's matrices.
    """
    if name == "w_out":
        experts_nE = experts_nE * config.output_scale
    axis = _unit_axis(name)
    dropped = round(config.drop * experts_nE.shape[axis])

    def one(matrix: Float[Array, "a b"], layer: Int[Array, ""], expert: Int[Array, ""]) -> Float[Array, "a b"]:
        of_expert = jax.random.fold_in(jax.random.fold_in(key, layer), expert)
        key_noise, key_drop = jax.random.split(jax.random.fold_in(of_expert, 1 + MATRICES.index(name)))
        if config.noise:
            matrix = matrix + config.noise * jnp.std(matrix) * jax.random.normal(key_noise, matrix.shape)
        if not dropped:
            return matrix
        rank = jnp.argsort(jnp.argsort(jax.random.uniform(jax.random.fold_in(of_expert, 0), (matrix.shape[axis],))))
        anew = jnp.broadcast_to(jnp.expand_dims(rank < dropped, -1 if axis == -2 else 0), matrix.shape)
        mean, std = jnp.mean(matrix, where=anew), jnp.std(matrix, where=anew)
        return jnp.where(anew, mean + std * jax.random.normal(key_drop, matrix.shape), matrix)

    over_experts = jax.vmap(one, (0, None, 0))
    return jax.vmap(over_experts, (0, 0, None))(experts_nE, layers, jnp.arange(experts_nE.shape[1]))


def group_columns(gate_nDE: Float[Array, "n D E"], pieces: int) -> Float[Array, "n D E"]:
    """A gate with one column for all experts of a virtual group: expert e's is column e // pieces of `gate_nDE`."""
    return jnp.take(gate_nDE, jnp.arange(gate_nDE.shape[-1]) // pieces, axis=-1)


def _unit_axis(name: str) -> int:
    """The axis of a matrix that its hidden units are along."""
    return -2 if name == "w_out" else -1
