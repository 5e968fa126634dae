"""Qwen3-30B-A3B, 128 experts of which a token has 8 (2505.09388).

    tfds build c4/en --data_dir=DIR --file_format=array_record           # once, where TensorFlow is installed
    python train.py --config=configs/qwen3_30b_a3b.py:v5p-64 --workdir=runs/qwen3 --config.data.data_dir=DIR \
        --config.data.tokenizer.path=DIR/tokenizer.json

MESHES has the slices that may stand behind the colon; without one it is v5p-64. Their meshes fit by
arithmetic (`moe.plan.search`); plan.py hasn't compiled them. To go on from the published weights:
--config.init_from=FOLDER.

It has not been run here. The model is the published one, with load balanced over the global batch (2501.11873): the
means are over all rows of a micro-batch, on whatever devices they lie. Its weight is the published one, which
transformers takes over all layers together, 8 at balance, where ours add up over layers, each 1 at balance. Batch,
steps and learning rate aren't published: they are OLMoE's (configs/olmoe_1b_7b.py). Rows are of 4 096 tokens, as in its
first stages; the model reads up to 40 960.

30.5 B parameters, 3.35 B of them for each token: about 20 GFLOP a token, or 9 000 tokens/s for a v5p chip at 40 % of
its peak. Parameters, moments and gradients take 611 GB on all devices together.
"""

import ml_collections

from configs.base.lm import get_lm
from configs.base.slices import meshes, micro_batches

MESHES = meshes(
    v5e_128=(64, 1, 2),
    v5e_256=(128, 1, 2),
    v5p_32=(16, 1, 1),
    v5p_64=(16, 1, 1),
    v5p_128=(16, 1, 1),
    v6e_64=(64, 1, 1),
    v6e_256=(64, 1, 1),
)


def get_config(preset: str = "v5p-64") -> ml_collections.ConfigDict:
    """The config on a slice of MESHES; every field can be set on the command line as --config.FIELD=VALUE."""
    config = get_lm()
    config.steps = 250_000
    config.model.update({
        "vocab_size": 151_936,
        "length": 40_960,
        "width": 2048,
        "depth": 48,
        "heads": 32,
        "kv_heads": 4,
        "head_width": 128,
        "mlp_width": 6144,
        "rope_theta": 1e6,
        "qk_norm": "head",
    })  # fmt: skip
    config.moe.update({"num_experts": 128, "expert_width": 768})
    config.router.k = 8
    config.router.softmax.update({"balance_weight": 0.001 * 8 / 48})
    config.optimizer.update({"learning_rate": 4e-4})
    config.mesh = dict(MESHES[preset])
    config.accumulation_steps = micro_batches(config.batch_size, MESHES[preset])
    return config
