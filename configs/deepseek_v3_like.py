"""A model like DeepSeek-V3, 256 experts of which a token has 8, and one for all tokens (2412.19437).

    tfds build c4/en --data_dir=DIR --file_format=array_record           # once, where TensorFlow is installed
    python train.py --config=configs/deepseek_v3_like.py:v5p-1024 --workdir=runs/deepseek --config.data.data_dir=DIR \
        --config.data.tokenizer.path=DIR/tokenizer.json

MESHES has the slices that may stand behind the colon; without one it is v5p-1024. plan.py has compiled
v5p-1024 (63.1 of 95.7 GiB); the other two fit by arithmetic.

It has not been run here. The published part: widths, three dense layers before the others, sigmoid router with a bias
that adapts outside the gradient, experts chosen within 4 of 8 groups, routed weights that sum to 2.5, a shared expert,
rows of 4 096 tokens and 15 360 of them in a batch, 14.8 T tokens, optimizer and rates. What differs from there:
grouped-query attention in place of latent attention, with 96 heads instead of 128, which gives it as many parameters
(191 M a layer, not 187); no prediction of a second token; bfloat16 instead of 8 bits; the bias adapts to the end, and
the learning rate falls along one cosine.

671 B parameters, 37.8 B of them for each token: about 227 GFLOP a token, or 800 tokens/s for a v5p chip at 40 % of its
peak. Parameters, moments and gradients take 13.4 TB on all devices together.
"""

import ml_collections

from configs.base.lm import get_lm
from configs.base.slices import meshes, micro_batches

MESHES = meshes(v5p_512=(32, 8, 1), v5p_1024=(32, 16, 1), v5p_2048=(32, 16, 2))


def get_config(preset: str = "v5p-1024") -> ml_collections.ConfigDict:
    """The config on a slice of MESHES; every field can be set on the command line as --config.FIELD=VALUE."""
    config = get_lm()
    config.steps = 235_245
    config.batch_size = 15_360
    config.model.update({
        "vocab_size": 129_280,
        "width": 7168,
        "depth": 61,
        "dense_layers": 3,
        "heads": 96,
        "kv_heads": 8,
        "head_width": 128,
        "mlp_width": 18_432,
    })  # fmt: skip
    config.moe.update({"num_experts": 256, "expert_width": 2048, "shared_experts": 1})
    config.router.update({"name": "sigmoid", "k": 8})
    config.router.sigmoid = {
        "bias_rate": 1e-3,
        "renormalize": True,
        "routed_scaling": 2.5,
        "expert_groups": 8,
        "groups_per_token": 4,
        "sequence_weight": 1e-4,
    }
    config.optimizer.update({"learning_rate": 2.2e-4})
    config.mesh = dict(MESHES[preset])
    config.accumulation_steps = micro_batches(config.batch_size, MESHES[preset])
    return config
