"""What the large language models have in common: every field of a config, for the files beside this folder to amend."""

import ml_collections


def get_lm() -> ml_collections.ConfigDict:
    """A decoder of bfloat16 activations on C4 by a tokenizer of one's own, without a size, a router or a mesh."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 1024
    # Micro-batches of 128 rows, so that a slice of 256 chips shares them in twos (tensor = 2) and one of 4 holds them.
    config.accumulation_steps = 8
    config.label_smoothing = 0.0
    config.loss = "softmax"
    config.init_from = ""
    config.upcycle = {"method": "copy", "noise": 0.0, "drop": 0.0, "output_scale": 1.0}
    config.log_every = 10
    config.evaluate_every = 1000
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
        "rope_scaling": {
            "name": "none",
            "linear": {"factor": 1.0},
            "llama3": {"factor": 8.0, "low_turns": 1.0, "high_turns": 4.0, "original_length": 8192},
            "yarn": {
                "factor": 4.0,
                "fast_turns": 32.0,
                "slow_turns": 1.0,
                "original_length": 4096,
                "truncate": True,
                "attention": 0.0,
            },
        },
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
    config.moe = {
        # Nothing is dropped in the published models, so a group is a row, and only says where means are taken.
        "group_size": 1,
        "dispatch": "dropless",
        "capacity_factor": 1.25,
        "evaluation_capacity_factor": 0.0,
        "receive_factor": 4.0,
        "balance_scope": "batch",
        "shared_experts": 0,
        "shared_gate": False,
    }
    config.router = {
        "name": "softmax",
        "softmax": {
            "noise": 0.0,
            "jitter": 0.0,
            "renormalize": True,
            "batch_priority": False,
            "expert_groups": 1,
            "groups_per_token": 1,
            "importance_weight": 0.0,
            "load_weight": 0.0,
            "balance_weight": 0.0,
            "z_weight": 0.0,
            "entropy_weight": 0.0,
        },
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
    config.checkpoint = {"every": 1000, "keep": 3}
    return config
