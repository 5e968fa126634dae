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

import ml_collections

from configs.base.image import get_imagenet
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
    config = get_imagenet()
    config.model.update({
        "patch_size": 16,
        "pooling": "mean",
        "representation_width": 0,
        "width": 384,
        "depth": 12,
        "heads": 6,
        "mlp_width": 1536,
        "moe_every": 1,
        "dense_layers": 6,
        "remat": "dots",
    })  # fmt: skip
    config.moe.update({"num_experts": 128, "expert_width": 1536, "group_size": 1})
    config.router = {"name": "soft", "k": 2, "soft": {"slots": 1, "normalize": True}}
    config.optimizer.update({"learning_rate": 1e-3, "final_fraction": 0.0, "weight_decay": 0.03})
    config.mesh = dict(MESHES[preset])
    return config
