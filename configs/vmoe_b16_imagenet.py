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

import ml_collections

from configs.base.image import get_imagenet
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
    config = get_imagenet()
    config.model.update({
        "patch_size": 16,
        "representation_width": 768,
        "width": 768,
        "depth": 12,
        "heads": 12,
        "mlp_width": 3072,
    })  # fmt: skip
    config.moe.expert_width = 3072
    config.optimizer.update({"learning_rate": 8e-4, "final_fraction": 1e-5 / 8e-4})
    config.mesh = dict(MESHES[preset])
    return config
