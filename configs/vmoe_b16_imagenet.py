"""V-MoE B/16 with experts in every second block, on ImageNet from scratch (2106.05974).

    tfds build imagenet2012 --data_dir=DIR --file_format=array_record    # once, where TensorFlow is installed
    python train.py --config=configs/vmoe_b16_imagenet.py --workdir=runs/vmoe_b16 --config.data.data_dir=DIR

The mesh is that of a v5e-32; MESHES has others: --config=configs/vmoe_b16_imagenet.py:v5e-64 and so on.

The published B/16 is trained on ImageNet-21k and fine-tuned; from scratch there is no published figure, and none from
here. Model and learning rate are the paper's, all else as in configs/vmoe_s32_imagenet.py, with the differences that
are named there. A model of this size overfits ImageNet: more augmentation is --config.data.photo.randaugment.magnitude.

285.3 M parameters. A training image costs about 140 GFLOP: 560 images/s for a v5e chip at 40 % of its peak, 2 600 for
a v6e chip, which 2 and 8 cores feed at 350 a core (benchmarks/image_pipeline.py).
"""

import math

import ml_collections

from configs.base.slices import meshes

# The batch is the same on each, and so is the result.
MESHES = meshes(
    v5e_32=(1, 8, 1),
    v5e_64=(1, 8, 1),
    v5p_16=(1, 8, 1),
    v5p_32=(1, 8, 1),
    v6e_16=(1, 8, 1),
    v6e_32=(1, 8, 1),
)


def get_config(preset: str = "v5e-32") -> ml_collections.ConfigDict:
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
        "pooling": "class_token",
        "representation_width": 768,
        "head_bias": -math.log(1000),
        "width": 768,
        "depth": 12,
        "heads": 12,
        "mlp_width": 3072,
        "activation": "gelu",
        "moe_every": 2,
        "dense_layers": 0,
        "scan_layers": True,
        "remat": "none",
        "dtype": "bfloat16",
    }
    config.moe = {
        "num_experts": 8,
        "expert_width": 3072,
        "group_size": 8,
        "dispatch": "auto",
        "capacity_factor": 1.05,
        "evaluation_capacity_factor": 0.0,
        "receive_factor": 4.0,
        "balance_scope": "group",
        "shared_experts": 0,
        "shared_gate": False,
    }
    config.router = {
        "name": "softmax",
        "k": 2,
        "softmax": {
            "noise": 1.0,
            "jitter": 0.0,
            "renormalize": False,
            "batch_priority": False,
            "expert_groups": 1,
            "groups_per_token": 1,
            "importance_weight": 0.005,
            "load_weight": 0.005,
            "balance_weight": 0.0,
            "z_weight": 0.0,
            "entropy_weight": 0.0,
        },
    }
    config.optimizer = {
        "learning_rate": 8e-4,
        "warmup_steps": 10_000,
        "final_fraction": 1e-5 / 8e-4,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 1.0,
    }
    config.mesh = dict(MESHES[preset])
    config.checkpoint = {"every": 1000, "keep": 3}
    return config
