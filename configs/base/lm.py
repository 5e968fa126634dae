"""What the large language models have in common: every field of a config, for the files beside this folder to amend."""

import ml_collections

from configs.base import parts


def get_lm() -> ml_collections.ConfigDict:
    """A decoder of bfloat16 activations on C4 by a tokenizer of one's own, without a size, a router or a mesh."""
    config = parts.new_config(batch_size=1024, log_every=10, evaluate_every=1000)
    config.data = {
        "name": "c4/en",
        "mixture": (),
        "paths": (),
        "test_paths": (),
        "format": "text",
        "field": "text",
        "tokenizer": {"kind": "huggingface", "path": "tokenizer.json", "begin": "", "end": ""},
        "length": 4096,
        "data_dir": "",
        "cache_dir": "",
        "train_split": "train[:1%]",
        "test_split": "validation[:1%]",
        "shuffle": True,
        "threads": 2,
        "workers": 0,
        "prefetch": 4,
        "corrupt": "stop",
    }
    config.model = {
        "name": "lm",
        "length": 4096,
        "head_width": 0,
        "activation": "swiglu",
        "moe_every": 1,
        "dense_layers": 0,
        "window": 0,
        "attention_cap": 0.0,
        "rope_theta": 10000.0,
        "rope_scaling": parts.rope_scaling(),
        "qk_norm": "none",
        "attention_bias": "none",
        "norm_eps": 1e-6,
        "tied_head": False,
        "logit_cap": 0.0,
        "z_weight": 0.0,
        "loss_chunk": 256,
        "scan_layers": True,
        "remat": "full",
        "dtype": "bfloat16",
    }
    config.moe = parts.experts(
        # Nothing is dropped in the published models, so a group is a row, and only says where means are taken.
        group_size=1,
        dispatch="dropless",
        capacity_factor=1.25,
        balance_scope="batch",
    )
    config.router = {
        "name": "softmax",
        "softmax": parts.softmax(),
        "sparse_topk": {"strength": 1.0, "p": 4 / 3, "max_experts": 16, "balance_weight": 0.001},
        "successive_halving": {"balance_weight": 0.001},
    }
    config.optimizer = {
        "warmup_steps": 2000,
        "final_fraction": 0.1,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "clip_norm": 1.0,
    }
    config.checkpoint = parts.checkpoint(every=1000, keep=3)
    return config
