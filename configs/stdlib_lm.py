"""A byte-level language model with mixture-of-experts blocks on the Python standard library's own sources.

    python train.py --config=configs/stdlib_lm.py --workdir=runs/stdlib_lm
    python -m moe.generate --workdir=runs/stdlib_lm --prompt='def main('

About 10 MB of source code to learn from and 1.3 MB of other files to measure on, which every machine has that can run
this. Every version of Python has sources of its own, named by the hash of their manifest, which the run prints and
result.json records: d38316b9434e… for Python 3.11.7, 9d6af6f150a9… for 3.13.0. Every byte is a token. The dense model
of the same active FLOPs: --config.model.moe_every=0 --config.model.mlp_width=1024. Results stand in README.md.
"""

import ml_collections

from configs.base import parts


def get_config() -> ml_collections.ConfigDict:
    """The config; every field can be set on the command line as --config.FIELD=VALUE."""
    config = parts.new_config(steps=900, batch_size=16, log_every=20, evaluate_every=0)
    config.data = {
        "name": "stdlib",
        "mixture": (),
        "paths": (),
        "test_paths": (),
        "format": "text",
        "field": "text",
        "tokenizer": {"kind": "bytes", "path": "", "begin": "", "end": ""},
        "length": 256,
        "data_dir": "",
        "cache_dir": "",
        "train_split": "train",
        "test_split": "test",
        "shuffle": True,
        "threads": 1,
        "workers": 0,
        "prefetch": 4,
        "corrupt": "stop",
    }
    config.model = {
        "name": "lm",
        "vocab_size": 257,
        "length": 256,
        "width": 256,
        "depth": 4,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 0,
        "mlp_width": 1024,
        "activation": "swiglu",
        "moe_every": 1,
        "dense_layers": 0,
        "window": 0,
        "attention_cap": 0.0,
        "rope_theta": 10000.0,
        "rope_scaling": parts.rope_scaling(),
        "qk_norm": "head",
        "attention_bias": "none",
        "norm_eps": 1e-6,
        "tied_head": False,
        "logit_cap": 0.0,
        "z_weight": 0.0,
        "loss_chunk": 64,
        "scan_layers": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.moe = parts.experts(
        num_experts=8,
        expert_width=512,
        group_size=16,
        capacity_factor=1.25,
    )
    config.router = {
        "name": "softmax",
        "k": 2,
        "softmax": parts.softmax(balance_weight=0.01, z_weight=0.001),
        "sparse_topk": {"strength": 1.0, "p": 4 / 3, "max_experts": 4, "balance_weight": 0.01},
        "successive_halving": {"balance_weight": 0.01},
    }
    config.optimizer = {
        "learning_rate": 2e-3,
        "warmup_steps": 100,
        "final_fraction": 0.1,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "clip_norm": 1.0,
    }
    config.mesh = {"dcn": 1, "data": -1, "fsdp": 1, "expert": 1, "tensor": 1}
    config.checkpoint = parts.checkpoint(every=300, keep=3)
    return config
