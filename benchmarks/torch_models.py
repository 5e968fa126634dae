"""The training steps that `benchmarks/train_step.py` is compared with: Mixtral and Mistral of transformers.

On the CPU, in float32; torch and transformers come with the extra `parity`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.torch_layers import MISSING

THREADS = 2
NAMES = () if MISSING else ("hf_grouped_mm", "hf_eager", "hf_dense")


def training_step(name: str, sizes: Any, tokens_BL: np.ndarray) -> Callable[[], Any]:
    """A call that trains on these rows once, and returns the loss.

    sizes: a `Case` of `benchmarks/train_step.py`. hf_grouped_mm, hf_eager: Mixtral, with these products of experts,
    and with its balance loss. hf_dense: Mistral of as many active FLOPs. Attention is PyTorch's own causal one,
    AdamW its fused one, and the gradient's norm is clipped.
    """
    import torch
    from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    shared = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.length,
        "sliding_window": None,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if name == "hf_dense":
        model = MistralForCausalLM(MistralConfig(intermediate_size=sizes.k * sizes.hidden, **shared))
    else:
        config = MixtralConfig(
            intermediate_size=sizes.hidden,
            num_local_experts=sizes.experts,
            num_experts_per_tok=sizes.k,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            experts_implementation=name.removeprefix("hf_"),
            **shared,
        )
        model = MixtralForCausalLM(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.tensor(tokens_BL, dtype=torch.int64)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step
