"""What the models of ImageNet have in common: every field of a config, for the files beside this folder to amend."""

import math

import ml_collections

from configs.base import parts


def get_imagenet() -> ml_collections.ConfigDict:
    """A vision transformer of bfloat16 activations on ImageNet-2012, without a size or a mesh.

    300 epochs of 4 096 images; loss, crops, RandAugment and router are V-MoE's (2106.05974).
    """
    config = parts.new_config(steps=92_899, batch_size=4096, loss="sigmoid", log_every=100, evaluate_every=1000)
    config.data = {
        "name": "imagenet2012",
        "data_dir": "",
        "train_split": "train[:99%]",
        "test_split": "validation",
        "image_size": 224,
        "shuffle": True,
        "in_memory": False,
        "threads": 16,
        "workers": 0,
        "prefetch": 2,
        "corrupt": "stop",
        "augment": {"shift": 0.0, "rotate_degrees": 0.0, "scale": 0.0, "flip": False, "shear_degrees": 0.0},
        "photo": {
            "min_area": 0.05,
            "max_ratio": 4 / 3,
            "flip": True,
            "randaugment": {"layers": 2, "magnitude": 10.0},
            "resize": 256,
            "value_range": (-1.0, 1.0),
        },
    }
    config.model = {
        "name": "vit",
        "image_size": (224, 224, 3),
        "num_classes": 1000,
        "pooling": "class_token",
        "head_bias": -math.log(1000),
        "activation": "gelu",
        "moe_every": 2,
        "dense_layers": 0,
        "scan_layers": True,
        "remat": "none",
        "dtype": "bfloat16",
    }
    config.moe = parts.experts(
        num_experts=8,
        group_size=8,
        capacity_factor=1.05,
    )
    config.router = {
        "name": "softmax",
        "k": 2,
        "softmax": parts.softmax(noise=1.0, renormalize=False, importance_weight=0.005, load_weight=0.005),
    }
    config.optimizer = {
        "warmup_steps": 10_000,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 1.0,
    }
    config.checkpoint = parts.checkpoint(every=1000, keep=3)
    return config
