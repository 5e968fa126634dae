"""Mixtral 8x7B, 8 experts of which a token has 2 (2401.04088).

    tfds build c4/en --data_dir=DIR --file_format=array_record           # once, where TensorFlow is installed
    python train.py --config=configs/mixtral_8x7b.py:v5p-128 --workdir=runs/mixtral --config.data.data_dir=DIR \
        --config.data.tokenizer.kind=sentencepiece --config.data.tokenizer.path=DIR/tokenizer.model

MESHES has the slices that may stand behind the colon; without one it is v5p-128. plan.py has compiled v5p-64 (43.1 of
95.7 GiB), v5p-128 (29.8), v5e-256 (10.9 of 15.7) and v6e-256 (22.2 of 31.2); v5e-128 and v6e-64 fit by arithmetic.

To go on from the published weights: --config.init_from=FOLDER.

It has not been run here. The model is the published one, and so is the weight of the balance loss, which transformers
takes over all layers together, 2 at balance, where ours add up over layers, each 1 at balance. How Mixtral was trained
isn't published: batch, steps and learning rate are OLMoE's (configs/olmoe_1b_7b.py) at a lower rate for the larger
model. Rows are of 4 096 tokens; the model reads up to 32 768, and --config.data.length=32768 trains on as many.

46.7 B parameters, 12.9 B of them for each token: about 77 GFLOP a token, or 2 400 tokens/s for a v5p chip at 40 % of
its peak. Parameters, moments and gradients take 934 GB on all devices together.
"""

import ml_collections

from configs.base.lm import get_lm
from configs.base.slices import meshes, micro_batches

MESHES = meshes(
    v5e_128=(16, 1, 8),
    v5e_256=(128, 1, 2),
    v5p_64=(4, 8, 1),
    v5p_128=(8, 8, 1),
    v6e_64=(16, 1, 4),
    v6e_256=(16, 1, 4),
)
# Of a device, in a micro-batch, where there is room for more than one.
ROWS = {"v5e-256": 2, "v5p-128": 2, "v6e-256": 4}


def get_config(preset: str = "v5p-128") -> ml_collections.ConfigDict:
    """The config on a slice of MESHES; every field can be set on the command line as --config.FIELD=VALUE."""
    config = get_lm()
    config.steps = 250_000
    config.model.update({
        "vocab_size": 32_000,
        "length": 32_768,
        "width": 4096,
        "depth": 32,
        "heads": 32,
        "kv_heads": 8,
        "mlp_width": 14_336,
        "rope_theta": 1e6,
        "norm_eps": 1e-5,
    })  # fmt: skip
    config.moe.update({"num_experts": 8, "expert_width": 14_336})
    config.router.k = 2
    config.router.softmax.update({"balance_weight": 0.02 * 2 / 32})
    config.optimizer.update({"learning_rate": 3e-4})
    config.mesh = dict(MESHES[preset])
    config.accumulation_steps = micro_batches(config.batch_size, MESHES[preset], ROWS.get(preset, 1))
    return config
