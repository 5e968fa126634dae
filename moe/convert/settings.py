"""What a Hugging Face config.json says, in our settings, and back."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from moe.layers.attention import AttentionBias, QkNorm
from moe.layers.moe import MoeConfig
from moe.models import LmConfig
from moe.ops.rope import Linear, Llama3, RopeScaling, Unscaled, Yarn
from moe.routers import Softmax


class Architecture(NamedTuple):
    """How one family names its settings and tensors.

    qk_norm: what its attention does. windows, dense: whether some of its models have sliding windows, blocks without
    experts. bias: the biases of its attention; a field of config.json where only some of its models have them, all of
    them. experts, expert_width: fields of config.json; "": it is a dense model. block: the module that holds gate and
    experts. expert: the matrices of an expert, ours → theirs.
    """

    class_name: str
    model_type: str
    qk_norm: QkNorm
    norm_eps: float
    rope_theta: float
    windows: bool = False
    bias: AttentionBias | Literal["attention_bias"] = "none"
    dense: bool = False
    experts: str = ""
    expert_width: str = ""
    block: str = ""
    expert: Mapping[str, str] = {}


PROJECTIONS = {"w_gate": "gate_proj", "w_in": "up_proj", "w_out": "down_proj"}
# Versions of transformers differ in which of these they write for one architecture.
_EXPERTS = ("num_experts", "num_local_experts")
_WINDOWED = "sliding_attention"
# Blocks or experts that a model can have; a config.json that asks for more isn't one.
_MOST = 100_000
ARCHITECTURES = (
    Architecture(
        "MixtralForCausalLM",
        "mixtral",
        "none",
        1e-5,
        1e6,
        windows=True,
        experts="num_local_experts",
        expert_width="intermediate_size",
        block="block_sparse_moe",
        expert={"w_gate": "w1", "w_in": "w3", "w_out": "w2"},
    ),
    Architecture(
        "OlmoeForCausalLM",
        "olmoe",
        "all",
        1e-5,
        1e4,
        bias="attention_bias",
        experts="num_experts",
        expert_width="intermediate_size",
        block="mlp",
        expert=PROJECTIONS,
    ),
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        "head",
        1e-6,
        1e4,
        windows=True,
        bias="attention_bias",
        dense=True,
        experts="num_experts",
        expert_width="moe_intermediate_size",
        block="mlp",
        expert=PROJECTIONS,
    ),
    Architecture("LlamaForCausalLM", "llama", "none", 1e-6, 1e4, bias="attention_bias", dense=True),
    Architecture("Qwen2ForCausalLM", "qwen2", "none", 1e-6, 1e4, windows=True, bias="qkv", dense=True),
    Architecture("Qwen3ForCausalLM", "qwen3", "head", 1e-6, 1e4, windows=True, bias="attention_bias", dense=True),
)


class Settings(NamedTuple):
    """The tables of our config that say what the arrays mean."""

    model: LmConfig
    moe: MoeConfig
    router: Softmax


def find_architecture(table: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names. Raises ValueError for one that isn't supported."""
    names = table.get("architectures") or []
    if not isinstance(names, list):
        raise ValueError(f"config.json has architectures = {names!r}: it must be a list.")
    for one in ARCHITECTURES:
        if one.class_name in names or (not names and table.get("model_type") == one.model_type):
            return one
    said = ", ".join(map(str, names)) or table.get("model_type") or "none"
    raise ValueError(
        f"the architecture {said} can't be converted: {', '.join(one.class_name for one in ARCHITECTURES)} can."
    )


def parse(table: Mapping[str, Any]) -> Settings:
    """Our settings for a config.json.

    Raises ValueError where it lacks something, or asks for what our model doesn't do.
    """
    one = find_architecture(table)
    try:
        return _parse(table, one)
    except (TypeError, AttributeError, KeyError, ZeroDivisionError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json has a value that can't stand there: {reason}.") from error


def _parse(table: Mapping[str, Any], one: Architecture) -> Settings:
    for name, wanted in (
        ("hidden_act", "silu"),
        ("clip_qkv", None),
        ("quantization_config", None),
        ("mlp_bias", False),
    ):
        if table.get(name, wanted) != wanted:
            raise ValueError(f"config.json has {name} = {table[name]!r}: only {wanted!r} can be converted.")
    moe, router = _parse_experts(table, one) if one.experts else _upcycled(table)
    return Settings(_parse_model(table, one), moe, router)


def _parse_experts(table: Mapping[str, Any], one: Architecture) -> tuple[MoeConfig, Softmax]:
    num_experts = next((_count(table, name) for name in _EXPERTS if table.get(name)), None) or _lacks(one.experts)
    moe = MoeConfig(
        num_experts=num_experts, expert_width=_count(table, one.expert_width), group_size=1, dispatch="dropless"
    )
    router = Softmax(
        k=_count(table, "num_experts_per_tok"),
        renormalize=one.model_type == "mixtral" or bool(table.get("norm_topk_prob", False)),
        jitter=float(table.get("router_jitter_noise", 0.0)),
        balance_weight=float(table.get("router_aux_loss_coef", 0.0)),
        noise=0.0,
        importance_weight=0.0,
        load_weight=0.0,
    )
    router.init(num_experts)
    return moe, router


def _upcycled(table: Mapping[str, Any]) -> tuple[MoeConfig, Softmax]:
    """The experts that a dense model lacks, as its copies would compute the same (see `moe.ops.upcycle`)."""
    moe = MoeConfig(expert_width=_count(table, "intermediate_size"), group_size=1, dispatch="dropless")
    return moe, Softmax(renormalize=True, noise=0.0, importance_weight=0.0, load_weight=0.0, balance_weight=0.01)


def _parse_model(table: Mapping[str, Any], one: Architecture) -> LmConfig:
    width, heads, depth = (_count(table, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    # Llama and Qwen2 came before there were such fields; what Qwen3 means without head_dim isn't width / heads.
    if one.experts and "num_key_value_heads" not in table:
        _lacks("num_key_value_heads")
    head_width = _need(table, "head_dim") if one.model_type == "qwen3" else table.get("head_dim") or width // heads
    if one.qk_norm == "all" and head_width * heads != width:
        raise ValueError(f"config.json has head_dim = {head_width}: {heads} heads must fill hidden_size = {width}.")
    dense_layers, moe_every = _layers(table, one, depth)
    theta, scaling = _rope(table, one)
    stored = table.get("dtype") or table.get("torch_dtype")
    return LmConfig(
        vocab_size=_count(table, "vocab_size"),
        length=_count(table, "max_position_embeddings"),
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=table.get("num_key_value_heads") or heads,
        head_width=head_width,
        mlp_width=_count(table, "intermediate_size"),
        moe_every=moe_every,
        dense_layers=dense_layers,
        window=_window(table, one, depth),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=one.qk_norm,
        attention_bias=_bias(table, one),
        norm_eps=float(table.get("rms_norm_eps", one.norm_eps)),
        tied_head=bool(table.get("tie_word_embeddings", False)),
        dtype="bfloat16" if stored == "bfloat16" else "float32",
    )


def generate(settings: Settings, original: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model: `original`, the one it came with or {}, as far as it still says the same.

    Raises ValueError for a model that no supported architecture is.
    """
    if original and not _difference(parse(original), settings):
        return dict(original)
    one = find_architecture(original) if original else _similar(settings)
    # Said in other words below.
    replaced = ("rope_parameters", "torch_dtype", *_EXPERTS)
    kept = {name: value for name, value in original.items() if name not in replaced}
    table = kept | dict(_fields(one, settings))
    if difference := _difference(parse(table), settings):
        raise ValueError(f"{one.class_name} has no {difference}: Hugging Face's format can't hold this model.")
    return table


def _similar(settings: Settings) -> Architecture:
    model = settings.model
    alike = [
        one for one in ARCHITECTURES if one.qk_norm == model.qk_norm and bool(one.experts) == bool(model.moe_every)
    ]
    if not alike:
        raise ValueError(f"Hugging Face's format can't hold a dense model with model.qk_norm = '{model.qk_norm}'.")
    return next((one for one in alike if one.bias == model.attention_bias), alike[0])


def _fields(one: Architecture, settings: Settings) -> Iterator[tuple[str, Any]]:
    model, moe, router = settings
    attention = model.attention
    yield from {
        "architectures": [one.class_name],
        "model_type": one.model_type,
        "hidden_act": "silu",
        "dtype": model.dtype,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.length,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_width,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_head,
        "rope_theta": model.rope_theta,
        "rope_scaling": _rope_fields(model.rope_scaling),
    }.items()
    if one.experts:
        yield one.experts, moe.num_experts
        yield one.expert_width, moe.expert_width
        yield "num_experts_per_tok", router.k
        yield "norm_topk_prob", router.renormalize
        yield "router_aux_loss_coef", router.balance_weight
    if one.windows:
        yield "sliding_window", model.window or None
        yield "use_sliding_window", model.window > 0
    if one.windows and not one.experts:
        yield "max_window_layers", 0
        yield "layer_types", [_WINDOWED if model.window else "full_attention"] * model.depth
    if one.bias == "attention_bias":
        yield "attention_bias", model.attention_bias == "all"
    if one.dense:
        yield "intermediate_size", model.mlp_width
    if one.dense and one.experts:
        yield "decoder_sparse_step", 1
        yield "mlp_only_layers", [i for i in range(model.depth) if not has_experts(model, i)]


def has_experts(model: LmConfig, layer: int) -> bool:
    """Whether block number `layer` has experts instead of an MLP."""
    later = layer - model.dense_layers
    return bool(model.moe_every) and later >= 0 and later % model.moe_every == model.moe_every - 1


def _layers(table: Mapping[str, Any], one: Architecture, depth: int) -> tuple[int, int]:
    """Our dense_layers and moe_every."""
    if not (one.experts and one.dense):
        return 0, 1 if one.experts else 0
    dense, every = table.get("mlp_only_layers") or [], table.get("decoder_sparse_step", 1)
    wanted = [i not in dense and (i + 1) % every == 0 for i in range(depth)]
    if not any(wanted):
        return 0, 0
    for moe_every in range(1, depth + 1):
        for dense_layers in range(depth):
            periods, rest = divmod(depth - dense_layers, moe_every)
            if not rest and [False] * dense_layers + ([False] * (moe_every - 1) + [True]) * periods == wanted:
                return dense_layers, moe_every
    raise ValueError(
        f"config.json has mlp_only_layers = {dense} and decoder_sparse_step = {every}: blocks without experts can only "
        "stand at the beginning, or at a regular distance from one another."
    )


def _window(table: Mapping[str, Any], one: Architecture, depth: int) -> int:
    # Qwen's files give a window even where it isn't used.
    used = one.windows and (one.model_type == "mixtral" or table.get("use_sliding_window", False))
    window = (table.get("sliding_window") or 0) if used else 0
    if one.experts or not window:
        return window
    # Dense models may have it in later blocks only.
    first = min(table.get("max_window_layers", 28), depth)
    windowed = [kind == _WINDOWED for kind in table.get("layer_types") or []] or [i >= first for i in range(depth)]
    if any(windowed) and not all(windowed):
        raise ValueError(
            f"config.json has sliding_window = {window} in {sum(windowed)} of {depth} blocks: only a window in all or "
            "none can be converted."
        )
    return window if all(windowed) else 0


def _bias(table: Mapping[str, Any], one: Architecture) -> AttentionBias:
    if one.bias == "attention_bias":
        return "all" if table.get("attention_bias") else "none"
    return one.bias


def _rope(table: Mapping[str, Any], one: Architecture) -> tuple[float, RopeScaling]:
    fields = table.get("rope_parameters") or table.get("rope_scaling") or {}
    theta = float(fields.get("rope_theta") or table.get("rope_theta") or one.rope_theta)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    partial = fields.get("partial_rotary_factor", table.get("partial_rotary_factor")) or 1.0
    if kind not in ("default", "linear", "llama3", "yarn") or partial != 1:
        raise ValueError(
            f"config.json has rotary positions of type '{kind}' over {partial} of each head: default, linear, llama3 "
            "and yarn over all of it can be converted."
        )
    if kind == "default":
        return theta, Unscaled()
    length = table["max_position_embeddings"]
    original = table.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings") or length
    factor = float(fields.get("factor") or length / original)
    if kind == "linear":
        return theta, Linear(factor)
    if kind == "llama3":
        low, high = (float(_need(fields, f"{end}_freq_factor")) for end in ("low", "high"))
        return theta, Llama3(factor, low, high, original)
    scale, scale_all = fields.get("mscale"), fields.get("mscale_all_dim")
    attention = float(fields.get("attention_factor") or 0.0)
    if not attention and scale and scale_all:
        attention = (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1)
    fast, slow = float(fields.get("beta_fast") or 32), float(fields.get("beta_slow") or 1)
    return theta, Yarn(factor, fast, slow, original, bool(fields.get("truncate", True)), attention)


def _rope_fields(scaling: RopeScaling) -> dict[str, Any] | None:
    match scaling:
        case Linear():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_turns,
                "high_freq_factor": scaling.high_turns,
                "original_max_position_embeddings": scaling.original_length,
            }
        case Yarn():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "beta_fast": scaling.fast_turns,
                "beta_slow": scaling.slow_turns,
                "original_max_position_embeddings": scaling.original_length,
                "truncate": scaling.truncate,
                **({"attention_factor": scaling.attention} if scaling.attention else {}),
            }
    return None


def _difference(one: Settings, other: Settings) -> str:
    """The first setting that changes what the model computes, as "name = value in `other`", or ""."""
    theirs = _meaning(other)
    return next(
        (f"{name} = {theirs[name]!r}" for name, value in _meaning(one).items() if value != theirs.get(name, value)), ""
    )


def _meaning(settings: Settings) -> dict[str, Any]:
    """The settings that an evaluation depends on."""
    model, moe, router = settings
    fields = {f"model.{field.name}": getattr(model, field.name) for field in dataclasses.fields(model)}
    for name in ("scan_layers", "remat", "dtype", "loss_chunk", "z_weight"):
        del fields[f"model.{name}"]
    fields["model.kv_heads"], fields["model.head_width"] = model.attention.kv_heads, model.attention.head_width
    del fields["model.mlp_width"]
    if not all(has_experts(model, layer) for layer in range(model.depth)):
        fields["model.mlp_width"] = model.mlp_width
    if model.moe_every:
        for name in ("num_experts", "expert_width", "shared_experts", "shared_gate"):
            fields[f"moe.{name}"] = getattr(moe, name)
        for name in ("k", "renormalize", "expert_groups", "groups_per_token"):
            fields[f"router.{name}"] = getattr(router, name)
    return fields


def _need(table: Mapping[str, Any], name: str) -> Any:
    return table[name] if table.get(name) is not None else _lacks(name)


def _count(table: Mapping[str, Any], name: str) -> int:
    """A whole number of at least 1, and of blocks or experts not more than any model has."""
    value, most = _need(table, name), _MOST if name in ("num_hidden_layers", *_EXPERTS) else 2**31 - 1
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"config.json has {name} = {value!r}: it must be a whole number from 1 to {most}.")
    return value


def _lacks(name: str) -> Any:
    raise ValueError(f"config.json lacks {name}.")
