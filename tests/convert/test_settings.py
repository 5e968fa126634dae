"""config.json to settings and back."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe.convert.settings import Settings, generate, has_experts, parse
from moe.layers.moe import MoeConfig
from moe.models import LmConfig
from moe.ops.rope import Linear, Llama3, Unscaled, Yarn
from moe.routers import Softmax

STORED = Path(__file__).parent / "stored"


def table_of(name: str) -> dict[str, Any]:
    return json.loads((STORED / name / "config.json").read_text())


# The fields that matter of the files that are published with these models.
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}

QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}


def test_dense_models() -> None:
    model, moe, router = parse(QWEN2_7B)
    assert (model.moe_every, model.mlp_width, model.attention_bias, model.window) == (0, 18944, "qkv", 0)
    assert (moe.expert_width, router.renormalize, router.noise) == (18944, True, 0.0)
    windowed = QWEN2_7B | {"use_sliding_window": True, "sliding_window": 4096}
    assert parse(windowed).model.window == 0, "max_window_layers: from block 28 on, and there is none"
    assert parse(windowed | {"max_window_layers": 0}).model.window == 4096
    assert parse(windowed | {"layer_types": ["sliding_attention"] * 28}).model.window == 4096
    with pytest.raises(ValueError, match="sliding_window = 4096 in 7 of 28 blocks"):
        parse(windowed | {"max_window_layers": 21})
    model = parse(LLAMA_7B).model
    assert (model.kv_heads, model.attention.head_width, model.attention_bias, model.qk_norm) == (
        32,
        128,
        "none",
        "none",
    )
    assert parse(LLAMA_7B | {"attention_bias": True}).model.attention_bias == "all"
    with pytest.raises(ValueError, match="mlp_bias = True: only False"):
        parse(LLAMA_7B | {"mlp_bias": True})
    with pytest.raises(ValueError, match="lacks head_dim"):
        parse(LLAMA_7B | {"architectures": ["Qwen3ForCausalLM"]})


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        (QWEN2_7B, {}),
        (QWEN2_7B, {"use_sliding_window": True, "max_window_layers": 0}),
        (LLAMA_7B, {"attention_bias": True}),
        (LLAMA_7B, {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64, "use_sliding_window": True}),
    ],
)
def test_dense_models_go_out_as_they_came(table: dict[str, Any], changes: dict[str, Any]) -> None:
    settings = parse(table | changes)
    made = generate(settings, {})
    assert parse(made).model == settings.model
    assert made["architectures"] == (table | changes)["architectures"]


def test_mixtral() -> None:
    model, moe, router = parse(MIXTRAL_8X7B)
    assert (model.width, model.depth, model.heads, model.kv_heads, model.attention.head_width) == (4096, 32, 32, 8, 128)
    assert (model.rope_theta, model.rope_scaling, model.norm_eps) == (1e6, Unscaled(), 1e-5)
    assert (model.length, model.vocab_size, model.dtype) == (32768, 32000, "bfloat16")
    assert (model.qk_norm, model.attention_bias, model.window, model.tied_head) == ("none", "none", 0, False)
    assert (moe.num_experts, moe.expert_width, model.moe_every, model.activation) == (8, 14336, 1, "swiglu")
    assert (router.k, router.renormalize, router.noise, router.balance_weight) == (2, True, 0.0, 0.02)
    assert parse(MIXTRAL_8X7B | {"sliding_window": 4096}).model.window == 4096


def test_qwen() -> None:
    model, moe, router = parse(QWEN3_30B_A3B)
    assert (model.kv_heads, model.attention.head_width, model.qk_norm) == (4, 128, "head")
    assert (moe.num_experts, moe.expert_width, router.k, router.renormalize) == (128, 768, 8, True)
    assert parse(QWEN3_30B_A3B | {"sliding_window": 4096}).model.window == 0
    assert parse(QWEN3_30B_A3B | {"sliding_window": 4096, "use_sliding_window": True}).model.window == 4096
    assert parse(QWEN3_30B_A3B | {"attention_bias": True}).model.attention_bias == "all"
    assert parse(QWEN3_30B_A3B | {"tie_word_embeddings": True}).model.tied_head


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, range(12)),
        ({"mlp_only_layers": [0, 1]}, range(2, 12)),
        ({"decoder_sparse_step": 3}, [2, 5, 8, 11]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1, 3]}, [5, 7, 9, 11]),
        ({"mlp_only_layers": list(range(12))}, []),
    ],
)
def test_blocks_without_experts(changes: dict[str, Any], expected: Any) -> None:
    settings = parse(QWEN3_30B_A3B | {"num_hidden_layers": 12} | changes)
    assert [layer for layer in range(12) if has_experts(settings.model, layer)] == list(expected)
    assert parse(generate(settings, {})).model == settings.model


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, Linear(2.5)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 7.0}}, Linear(2.0)),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4, "low_freq_factor": 2, "high_freq_factor": 3}},
            Llama3(4.0, 2.0, 3.0, 40960),
        ),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 8192}}, Yarn(5.0, 32.0, 1.0, 8192)),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "attention_factor": 1.5, "truncate": False}},
            Yarn(4.0, 32.0, 1.0, 40960, False, 1.5),
        ),
        # .1 · m · ln 4 + 1 for m = 2, over that for m = 1.
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "mscale": 2.0, "mscale_all_dim": 1.0}},
            Yarn(4.0, 32.0, 1.0, 40960, True, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ),
    ],
)
def test_rotary_positions(fields: dict[str, Any], expected: Any) -> None:
    settings = parse(QWEN3_30B_A3B | fields)
    assert settings.model.rope_scaling == expected
    assert settings.model.rope_theta == (7.0 if "rope_parameters" in fields else 1e6)
    again = parse(generate(settings, {})).model
    assert (again.rope_scaling, again.rope_theta) == (expected, settings.model.rope_theta)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen", "llama", "qwen2", "qwen3"])
def test_a_config_that_still_holds_is_kept_as_it_was(name: str) -> None:
    table = table_of(name) | {"eos_token_id": 5}
    settings = parse(table)
    assert generate(settings, table) == table
    model = Settings(parse(table | {"rms_norm_eps": 0.25}).model, settings.moe, settings.router)
    changed = generate(model, table)
    assert (changed["eos_token_id"], changed["rms_norm_eps"]) == (5, 0.25)
    assert parse(changed).model == model.model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["DeepseekV3ForCausalLM"]},
            "architecture DeepseekV3ForCausalLM can't be converted: Mixtral",
        ),
        ({"architectures": None}, "architecture none can't be converted"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ({"clip_qkv": 8.0}, r"clip_qkv = 8\.0: only None"),
        ({"quantization_config": {}}, "quantization_config = {}"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "type 'dynamic' .*: default, linear, llama3 and yarn"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"over 0\.5 of each head"),
        ({"num_experts": None}, "lacks num_experts"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_experts_per_tok": 200}, r"router\.k = 200"),
        ({"mlp_only_layers": [5]}, r"mlp_only_layers = \[5\] and decoder_sparse_step = 1: blocks without experts"),
    ],
)
def test_what_cannot_be_converted(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(QWEN3_30B_A3B | changes)


def test_missing_fields() -> None:
    with pytest.raises(ValueError, match="lacks num_key_value_heads"):
        parse({name: value for name, value in MIXTRAL_8X7B.items() if name != "num_key_value_heads"})
    with pytest.raises(ValueError, match="head_dim = 4: 4 heads must fill hidden_size = 24"):
        parse(table_of("olmoe") | {"head_dim": 4})


PLAIN = LmConfig(vocab_size=5, length=8, width=8, depth=2, heads=2, mlp_width=8, moe_every=1, activation="swiglu")
ROUTER = Softmax(noise=0.0, load_weight=0.0, renormalize=True)


@pytest.mark.parametrize(
    ("model", "moe", "router", "words"),
    [
        ({"logit_cap": 3.0}, {}, ROUTER, r"MixtralForCausalLM has no model.logit_cap = 3\.0"),
        ({"activation": "gelu"}, {}, ROUTER, r"no model.activation = 'gelu'"),
        ({"moe_every": 2}, {}, ROUTER, r"no model.moe_every = 2"),
        ({"qk_norm": "all", "window": 3}, {}, ROUTER, r"OlmoeForCausalLM has no model.window = 3"),
        ({"qk_norm": "head", "attention_bias": "qkv"}, {}, ROUTER, r"Qwen3MoeForCausalLM has no model.attention_bias"),
        ({}, {"shared_experts": 1}, ROUTER, r"no moe.shared_experts = 1"),
        ({}, {}, Softmax(noise=0.0, load_weight=0.0), r"no router.renormalize = False"),
        ({"moe_every": 0, "window": 3}, {}, ROUTER, r"LlamaForCausalLM has no model.window = 3"),
        ({"moe_every": 0, "qk_norm": "all"}, {}, ROUTER, r"dense model with model.qk_norm = 'all'"),
    ],
)
def test_models_of_ours_that_the_format_lacks(model: dict, moe: dict, router: Any, words: str) -> None:
    settings = Settings(dataclasses.replace(PLAIN, **model), MoeConfig(**moe), router)
    with pytest.raises(ValueError, match=words):
        generate(settings, {})
