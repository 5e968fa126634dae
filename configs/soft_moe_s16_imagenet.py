"""Soft MoE S/16 with 128 experts in the last six blocks, on ImageNet from scratch (2308.00951).

    tfds build imagenet2012 --data_dir=DIR --file_format=array_record    # once, where TensorFlow is installed
    python train.py --config=configs/soft_moe_s16_imagenet.py --workdir=runs/soft_moe_s16 --config.data.data_dir=DIR

The mesh is that of a v5e-8; MESHES has others: --config=configs/soft_moe_s16_imagenet.py:v5p-16 and so on.

The published S/16 is trained on JFT-4B, which nobody else has; on ImageNet from scratch there is no published figure,
and none from here. Model, slots and optimizer are the paper's (its repository, pretrain_jft4b, soft-s16); crops, flip
and RandAugment are V-MoE's for ImageNet. What differs from there: no biases in matrices, queries and keys are not
normalised, weight decay is the same for the head as for all, and the learning rate falls along a cosine, not as a
reciprocal root.

921.2 M parameters. A training image costs about 25 GFLOP: 3 100 images/s for a v5e chip at 40 % of its peak, 15 000
for a v6e chip, which 9 and 43 cores feed at 350 a core (benchmarks/image_pipeline.py).
"""

import math

import ml_collections

from configs.base.slices import meshes

# The batch is the same on each, and so is the result.
MESHES = meshes(
    v5e_8=(1, 8, 1),
    v5e_16=(1, 8, 1),
    v5p_8=(1, 4, 1),
    v5p_16=(1, 8, 1),
    v6e_8=(1, 8, 1),
    v6e_16=(1, 8, 1),
)


def get_config(preset: str = "v5e-8") -> ml_collections.ConfigDict:
    """The config on a slice of MESHES; every field can be set on the command line as --config.FIELD=VALUE."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 92_899
    config.batch_size = 4096
    config.accumulation_steps = 1
    config.label_smoothing = 0.0
    config.loss = "sigmoid"
    config.init_from = ""
    config.upcycle = {"method": "copy", "noise": 0.0, "drop": 0.0, "output_scale": 1.0}
    config.log_every = 100
    config.evaluate_every = 1000
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
        "patch_size": 16,
        "num_classes": 1000,
        "pooling": "mean",
        "representation_width": 0,
        "head_bias": -math.log(1000),
        "width": 384,
        "depth": 12,
        "heads": 6,
        "mlp_width": 1536,
        "activation": "gelu",
        "moe_every": 1,
        "dense_layers": 6,
        "scan_layers": True,
        "remat": "dots",
        "dtype": "bfloat16",
    }
    config.moe = {
        "num_experts": 128,
        "expert_width": 1536,
        "group_size": 1,
        "dispatch": "auto",
        "capacity_factor": 1.05,
        "evaluation_capacity_factor": 0.0,
        "receive_factor": 4.0,
        "balance_scope": "group",
        "shared_experts": 0,
        "shared_gate": False,
    }
    config.router = {"name": "soft", "k": 2, "soft": {"slots": 1, "normalize": True}}
    config.optimizer = {
        "learning_rate": 1e-3,
        "warmup_steps": 10_000,
        "final_fraction": 0.0,
        "weight_decay": 0.03,
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 1.0,
    }
    config.mesh = dict(MESHES[preset])
    config.checkpoint = {"every": 1000, "keep": 3}
    return config
