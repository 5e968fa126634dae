"""OLMoE-1B-7B, 64 experts of which a token has 8, from scratch (2409.02060).

    tfds build c4/en --data_dir=DIR --file_format=array_record           # once, where TensorFlow is installed
    python train.py --config=configs/olmoe_1b_7b.py:v5p-64 --workdir=runs/olmoe --config.data.data_dir=DIR \
        --config.data.tokenizer.path=DIR/tokenizer.json

MESHES has the slices that may stand behind the colon; without one it is v5p-64. plan.py has compiled v5e-16 (12.1 of
15.7 GiB), v5e-256 (8.3), v5p-128 (39.0 of 95.7) and v6e-256 (9.6 of 31.2); on the others of a kind a chip has as many
rows, and at most twice the parameters. tokenizer.json is that of the published model, whose 50 280 tokens leave the
rest of the vocabulary unused.

It has not been run here. Sizes, batch, optimizer and losses are the published ones: 1 024 rows of 4 096 tokens, 5.0 T
tokens before the annealing. Its losses are means over layers, and its z loss is divided by k as well (MegaBlocks); ours
add up over layers, so the weights are divided here. What differs from there: the text, of which OLMoE's own mixture
would be JSONL in data.paths; embeddings, norms and matrices are drawn by our rule, not truncated at σ = .02; norms
don't decay.

6.92 B parameters, 1.28 B of them for each token: about 8 GFLOP a token, or 24 000 tokens/s for a v5p chip at 40 % of
its peak. Parameters, moments and gradients take 138 GB on all devices together.
"""

import ml_collections

from configs.base.lm import get_lm
from configs.base.slices import meshes, micro_batches

MESHES = meshes(
    v5e_16=(16, 1, 1),
    v5e_64=(16, 1, 1),
    v5e_256=(64, 1, 1),
    v5p_8=(4, 1, 1),
    v5p_64=(4, 1, 1),
    v5p_128=(4, 1, 1),
    v6e_16=(16, 1, 1),
    v6e_64=(16, 1, 1),
    v6e_256=(32, 1, 1),
)
# Of a device, in a micro-batch, where there is room for more than one.
ROWS = {"v5e-256": 4, "v5p-8": 2, "v5p-64": 2, "v5p-128": 2, "v6e-16": 4, "v6e-64": 4, "v6e-256": 4}


def get_config(preset: str = "v5p-64") -> ml_collections.ConfigDict:
    """The config on a slice of MESHES; every field can be set on the command line as --config.FIELD=VALUE."""
    config = get_lm()
    config.steps = 1_192_093
    config.model.update({
        "vocab_size": 50_304,
        "width": 2048,
        "depth": 16,
        "heads": 16,
        "kv_heads": 16,
        "mlp_width": 8192,
        "qk_norm": "all",
        "norm_eps": 1e-5,
    })  # fmt: skip
    config.moe.update({"num_experts": 64, "expert_width": 1024})
    config.router.k = 8
    config.router.softmax.update({"renormalize": False, "balance_weight": 0.01 / 16, "z_weight": 0.001 / (16 * 8)})
    config.optimizer.update({"learning_rate": 4e-4, "warmup_steps": 2500})
    config.mesh = dict(MESHES[preset])
    config.accumulation_steps = micro_batches(config.batch_size, MESHES[preset], ROWS.get(preset, 1))
    return config
