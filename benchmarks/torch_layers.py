"""The layers that `benchmarks/moe_layer.py` is compared with: dense in PyTorch, and Mixtral's experts of transformers.

On the same numbers and the same choices of experts, on the CPU; both packages come with the extra `parity`.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Otherwise its threads go on spinning into the time of whatever runs next. Read when the library is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

Call = Callable[[], Any]
Weights = Mapping[str, np.ndarray]
MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


def layers(x_TD: np.ndarray, expert_TK: np.ndarray, experts: Weights, dense: Weights) -> dict[str, Call]:
    """`torch_dense`, `hf_eager` and `hf_grouped_mm`; {} unless both packages are installed.

    experts, dense: w_in, w_gate and w_out of SwiGLU, with and without a leading axis of experts. Each call returns half
    the squares' sum of the outputs, and its gradients in x and all matrices; choices weigh 1 / K.
    """
    if MISSING:
        return {}
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    x = torch.tensor(x_TD, requires_grad=True)
    matrices = {name: torch.tensor(w, requires_grad=True) for name, w in dense.items()}
    calls = {"torch_dense": functools.partial(_with_gradients, functools.partial(_swiglu, matrices), x, matrices)}
    index = torch.tensor(expert_TK, dtype=torch.int64)
    weight = torch.full(expert_TK.shape, 1.0 / expert_TK.shape[1])
    for implementation in ("eager", "grouped_mm"):
        mixtral = _mixtral_experts(implementation, experts)
        apply = functools.partial(mixtral, top_k_index=index, top_k_weights=weight)
        parameters = dict(mixtral.named_parameters())
        calls[f"hf_{implementation}"] = functools.partial(_with_gradients, apply, x, parameters)
    return calls


def products(shapes: Sequence[tuple[int, int, int]]) -> dict[str, Call]:
    """A product of float32 matrices of each shape (rows, contraction, columns) in PyTorch; {} without it."""
    if "torch" in MISSING:
        return {}
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    return {
        f"torch {rows}x{inner}x{columns}": functools.partial(
            torch.matmul, torch.randn(rows, inner), torch.randn(inner, columns)
        )
        for rows, inner, columns in shapes
    }


def _with_gradients(apply: Callable[[Any], Any], x: Any, matrices: Mapping[str, Any]) -> tuple[Any, ...]:
    import torch

    total = 0.5 * apply(x).square().sum()
    return total, *torch.autograd.grad(total, [x, *matrices.values()])


def _swiglu(w: Mapping[str, Any], x: Any) -> Any:
    import torch

    return (torch.nn.functional.silu(x @ w["w_gate"]) * (x @ w["w_in"])) @ w["w_out"]


def _mixtral_experts(implementation: str, experts: Weights) -> Any:
    """The module behind Mixtral's router, with these weights in its own layout: transposed, gate and input in one."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    num_experts, width, hidden = experts["w_in"].shape
    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_local_experts=num_experts,
        hidden_act="silu",
        experts_implementation=implementation,
    )
    module = MixtralExperts(config)
    both = np.concatenate([experts["w_gate"], experts["w_in"]], axis=2)
    with torch.no_grad():
        module.gate_up_proj.copy_(torch.tensor(both).transpose(1, 2))
        module.down_proj.copy_(torch.tensor(experts["w_out"]).transpose(1, 2))
    return module
