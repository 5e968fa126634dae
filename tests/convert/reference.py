"""Random tiny models of `transformers`, to hold conversions against; also makes the stored vectors.

    python tests/convert/reference.py [NAME …]       # where torch and transformers are installed: the extra `parity`

writes tests/convert/stored/NAME/ anew: config.json, model.safetensors, tokens.npy, logits.npy.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

STORED = Path(__file__).parent / "stored"
COMMON = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXTRAL = COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_theta": 100.0}}
OLMOE = COMMON | {"num_experts": 4, "num_experts_per_tok": 2}
QWEN = COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12, "rope_theta": 50.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
    "rope_theta": 80.0,
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
# Every setting off its default somewhere: (class, fields of its config).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", MIXTRAL | {"sliding_window": 5}),
    "mixtral_tied": (
        "Mixtral",
        MIXTRAL | {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-2},
    ),
    "mixtral_one_expert": ("Mixtral", MIXTRAL | {"num_experts_per_tok": 1, "num_key_value_heads": 4, "head_dim": 10}),
    "mixtral_linear": ("Mixtral", MIXTRAL | {"rope_parameters": LINEAR, "num_experts_per_tok": 4}),
    "olmoe": ("Olmoe", OLMOE | {"num_experts_per_tok": 3}),
    "olmoe_normalised": (
        "Olmoe",
        OLMOE | {"norm_topk_prob": True, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "olmoe_biases": ("Olmoe", OLMOE | {"attention_bias": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "qwen": ("Qwen3Moe", QWEN | {"norm_topk_prob": True, "rope_parameters": YARN}),
    "qwen_raw": ("Qwen3Moe", QWEN | {"attention_bias": True, "num_experts_per_tok": 1, "num_key_value_heads": 4}),
    "qwen_window": ("Qwen3Moe", QWEN | {"use_sliding_window": True, "sliding_window": 3, "tie_word_embeddings": True}),
    "qwen_dense_first": ("Qwen3Moe", QWEN | {"mlp_only_layers": [0], "num_hidden_layers": 3}),
    "qwen_every_second": ("Qwen3Moe", QWEN | {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen_yarn_factor": (
        "Qwen3Moe",
        QWEN
        | {
            "rope_parameters": YARN
            | {
                "attention_factor": 1.3,
                "beta_fast": 2.0,
                "beta_slow": 0.7,
                "original_max_position_embeddings": 24,
                "truncate": False,
            }
        },
    ),
    "llama": ("Llama", COMMON | {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "llama_biases": (
        "Llama",
        COMMON | {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 10, "rms_norm_eps": 1e-3},
    ),
    "qwen2": ("Qwen2", COMMON | {"rope_parameters": {"rope_theta": 300.0}}),
    "qwen2_window": (
        "Qwen2",
        COMMON | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "num_key_value_heads": 4},
    ),
    "qwen3": ("Qwen3", COMMON | {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_biases": ("Qwen3", COMMON | {"head_dim": 6, "attention_bias": True, "rope_parameters": YARN}),
}
STORED_NAMES = ("mixtral", "olmoe", "qwen", "llama", "qwen2", "qwen3")


def make_model(name: str, seed: int = 0) -> Any:
    """A model with random norms and biases as well."""
    import torch
    import transformers

    kind, fields = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**fields, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            shift = 1.0 if parameter.ndim == 1 else 0.0
            parameter.normal_(shift, 0.3)
    return model


def run(model: Any, tokens_BL: np.ndarray) -> np.ndarray:
    """Float32 logits."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_BL), use_cache=False).logits.float().numpy()


def make_tokens(rows: int = 3, length: int = 40) -> np.ndarray:
    """Random ids."""
    return np.random.default_rng(0).integers(0, COMMON["vocab_size"], (rows, length)).astype(np.int32)


def main() -> None:
    """Makes the stored vectors, all of them or those named."""
    for name in sys.argv[1:] or STORED_NAMES:
        folder = STORED / name
        model = make_model(name)
        model.save_pretrained(folder)
        tokens_BL = make_tokens(2, 24)
        np.save(folder / "tokens.npy", tokens_BL)
        np.save(folder / "logits.npy", run(model, tokens_BL))
        (folder / "generation_config.json").unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
