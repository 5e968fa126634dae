"""Random configs of tiny models, as overrides of a config file: right ones, mistakes, and fields set to anything."""

import itertools
import math
from typing import Any

import ml_collections
from hypothesis import strategies as st

from moe import config as config_lib
from moe.routers import ROUTERS

DEVICES = 8
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=5) if math.prod(sizes) == DEVICES]
AXES = ("dcn", "data", "fsdp", "expert", "tensor")
FILES = {"vit": "configs/digits.py", "lm": "configs/stdlib_lm.py"}

# What is right for every router with k experts per token, E in all, beside its default settings.
ROUTER_FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "softmax": {
        "noise": (0.5, 1.0),
        "jitter": (0.0, 0.1),
        "renormalize": (False, True),
        "batch_priority": (False, True),
        "importance_weight": (0.0, 0.01),
        "load_weight": (0.0, 0.01),
        "balance_weight": (0.0, 0.01),
        "z_weight": (0.0, 0.01),
        "entropy_weight": (0.0, 0.01),
    },
    "sparse_topk": {
        "composition": ("mask_softmax", "mask", "magnitude"),
        "gate": ("softmax", "relu"),
        "choice": ("token", "expert"),
        "strength": (0.01, 1.0, 10.0),
        "schedule": ("constant", "geometric", "learned"),
        "p": (1.25, "4/3", 2.0),
        "balance_weight": (0.0, 0.01),
        "importance_weight": (0.0, 0.01),
        "z_weight": (0.0, 0.01),
    },
    "successive_halving": {
        "over": ("experts", "tokens"),
        "weights.name": ("boosted_softmax", "boosted_normalised", "softmax", "centred_boost"),
        "balance_weight": (0.0, 0.01),
        "importance_weight": (0.0, 0.01),
        "z_weight": (0.0, 0.01),
    },
    "sigmoid": {
        "bias_rate": (0.0, 0.1),
        "renormalize": (False, True),
        "routed_scaling": (1.0, 2.5),
        "sequence_weight": (0.0, 0.01),
    },
    "relu": {"coefficient": (1e-8, 0.1), "factor": (1.0, 1.2), "balanced": (False, True)},
    "sinkhorn": {
        "iterations": (1, 16),
        "temperature": (0.1, 1.0),
        "gate": ("softmax", "sigmoid"),
        "z_weight": (0.0, 0.01),
    },
    "sparse_transport": {"strength": (0.1, 1.0), "iterations": (1, 20), "z_weight": (0.0, 0.01)},
    "dselect_k": {
        "width": (0.5, 2.0),
        "selector_entropy_weight": (0.0, 0.01),
        "reach_weight": (0.0, 0.01),
        "importance_weight": (0.0, 0.01),
    },
    "expert_choice": {"z_weight": (0.0, 0.01)},
    "soft": {"slots": (1, 3), "normalize": (False, True)},
    "hash": {"seed": (0, 7)},
    "random": {"seed": (0, 7)},
    "dense": {"z_weight": (0.0, 0.01)},
}
WITH_GROUPS, WITH_MOST = {"softmax", "sigmoid"}, {"sparse_topk", "relu", "dselect_k"}

BLOCKS = [(1, 0, 1), (1, 0, 0), (2, 0, 1), (2, 0, 2), (2, 1, 1), (2, 1, 0)]  # depth, dense layers, every n-th

# Wrong in any of the right configs below, by field. A value may bring further overrides along, as on a command line,
# where the last one of a field wins.
MISTAKES: dict[str, tuple[Any, ...]] = {
    "steps": (0, -3, "many", 1.5, "", 2**64),
    "steps.of": (3,),
    "stepz": (3,),
    "seed": (-1, 2**32, 2**64),
    "batch_size": (0, -8, 13, "nan"),
    "accumulation_steps": (0, -1, 7, 1024),
    "label_smoothing": (1.0, -0.1, "nan", "inf", "1/0"),
    "loss": ("hinge", ""),
    "log_every": (0,),
    "evaluate_every": (-1,),
    "checkpoint.keep": (0,),
    "checkpoint.every": (-1,),
    **{f"mesh.{axis}": (0, -2, 3, 16) for axis in AXES},
    "mesh.data": (0, -2, 3, 16, "-1 --mesh.fsdp=-1", "-1 --mesh.expert=3"),
    "mesh": (8,),
    "mesh.sdp": (2,),
    "model.name": ("resnet",),
    "model.dtype": ("float16",),
    "model.activation": ("relu",),
    "model.remat": ("some",),
    "model.scan_layers": ("maybe",),
    **{f"model.{name}": (0, -1) for name in ("width", "depth", "heads", "mlp_width")},
    "model.heads": (0, -1, "3 --model.head_width=0"),
    "model.moe_every": (-1, 3, "2 --model.depth=3"),
    "model.dense_layers": (-1, 2),
    "moe.num_experts": (0, -1),
    "moe.expert_width": (0, -1),
    "moe.group_size": (-1, 7, 1000),
    "moe.capacity_factor": (-1, "nan", "inf", "0 --moe.dispatch=einsum", "0 --moe.dispatch=capacity"),
    "moe.evaluation_capacity_factor": (-1, "nan", "inf", "1 --moe.dispatch=dropless"),
    "moe.receive_factor": (0, -1, "nan", "inf", "1e400"),
    "moe.dispatch": ("sorted", ""),
    "moe.balance_scope": ("world",),
    "moe.shared_experts": (-1, "0 --moe.shared_gate=true"),
    "router.k": ("two",),
    "router.name": ("softmx", "", "topk", "None"),
    **{f"optimizer.{name}": (-1, "nan", "inf", "-inf", "x") for name in ("learning_rate", "weight_decay", "clip_norm")},
    "optimizer.final_fraction": (-1, "nan"),
    "optimizer.b1": (-0.1, 1, "nan"),
    "optimizer.b2": (-0.1, 1, "nan"),
    "optimizer.warmup_steps": (-1, "3 --steps=3"),
    "optimizer.momentum": (0.9,),
    "compiler.preset": ("fast",),
    "compiler.options": ("('opt=3',)", "(3,)", "x"),
    "upcycle.method": ("clone",),
    "upcycle.drop": (2,),
    "upcycle.noise": (-1,),
    "upcycle.output_scale": (0,),
    "wandb.mode": ("sometimes", ""),
    "data.prefetch": (0,),
    "data.threads": (-1,),
    "data.workers": (-1,),
}
# Wrong where there is a block with experts, and that router.
ROUTER_MISTAKES: dict[str, dict[str, tuple[Any, ...]]] = {
    "softmax": {
        "noise": (-1, "nan"),
        "jitter": (1,),
        "expert_groups": (0, -1, 1000),
        "groups_per_token": (0,),
        "temperature": (1,),
    },
    "sparse_topk": {
        "strength": (0, "nan", "inf", 1e-60),
        "p": (1, 3, "nan"),
        "solver": ("threshold",),
        "solver.name": ("newton",),
        "strength_steps": (0,),
        "max_experts": (-1,),
        "composition": ("sum",),
    },
    "successive_halving": {"over": ("groups",), "weights.name": ("x",), "weights.boosted_softmax.base": (1, "inf")},
    "sigmoid": {
        "bias_rate": (-1, "nan"),
        "routed_scaling": (0,),
        "expert_groups": (0, -1),
        "groups_per_token": (1000,),
    },
    "relu": {"coefficient": (0, "nan"), "factor": (0.5, "inf"), "max_experts": (-1,)},
    "sinkhorn": {"iterations": (0,), "temperature": (0, "nan"), "gate": ("relu",)},
    "sparse_transport": {"strength": (0, "nan"), "iterations": (0,)},
    "dselect_k": {"width": (0, "nan"), "max_experts": (-1,)},
    "expert_choice": {"z_weight": ("nan", "x")},
    "soft": {"slots": (0, -1), "normalize": (2,)},
    "hash": {"seed": ("x",)},
    "random": {"seed": ("x", 2**64, -(2**63) - 1)},
    "dense": {"z_weight": ("nan",)},
}
MODEL_MISTAKES: dict[str, dict[str, tuple[Any, ...]]] = {
    "vit": {
        "image_size": (8, (8, 8), (8, 8, 0), (8, 8, "a"), (8.0, 8, 1), (-8, 8, 1)),
        "patch_size": (0, 3, -1, 16),
        "num_classes": (0, -1),
        "pooling": ("max",),
        "representation_width": (-1,),
        "head_bias": ("nan",),
        "vocab_size": (3,),
    },
    "lm": {
        "vocab_size": (0,),
        "length": (0,),
        "loss_chunk": (0,),
        "kv_heads": (-1, 3),
        "head_width": (3, -2),
        "window": (-1,),
        "attention_cap": (-1, "nan"),
        "rope_theta": (1, "nan"),
        "rope_scaling.name": ("x",),
        "qk_norm": ("some",),
        "attention_bias": ("x",),
        "norm_eps": (0, "nan"),
        "logit_cap": (-1,),
        "z_weight": ("nan",),
        "patch_size": (4,),
    },
}

# What a field may be set to on a command line, small where it may be a size.
ANYTHING = [
    *("-1", "0", "1", "2", "3", "7", "0.5", "-0.5", "nan", "inf", "-inf", "1e-60", "1e60", "1/3", "1/0", str(10**20)),
    *("true", "false", "", "x", "none", "(1,2)", "()", "(1,'a')", "(8,8,1)", "('xla=1',)", "[1", str(-(10**20))),
]


@st.composite
def right(draw: st.DrawFn) -> tuple[str, ...]:
    """A config that trains, on eight devices or on one: its model's name, and then overrides of the model's file."""

    def pick(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    sizes = pick(*MESHES, *[(1,) * len(AXES)] * 5)
    dcn, data, fsdp, expert, tensor = sizes
    free = pick(None, *range(len(AXES)))
    shards, accumulation = dcn * data * fsdp * expert, pick(1, 1, 2, 3)
    micro = shards * pick(1, 2)
    name, heads = pick("vit", "vit", "lm"), min(tensor * pick(1, 2), 8)
    depth, dense_layers, moe_every = pick(*BLOCKS)
    dispatch, experts = pick("auto", "einsum", "capacity", "dropless"), expert * pick(1, 2, 3)
    warmup = pick(0, 1)
    fields: dict[str, Any] = {
        **{f"mesh.{axis}": -1 if index == free else sizes[index] for index, axis in enumerate(AXES)},
        "seed": pick(0, 2**32 - 1),
        "steps": pick(2, 1000, 2**31 - 1),
        "batch_size": micro * accumulation,
        "accumulation_steps": accumulation,
        "label_smoothing": pick(0.0, 0.1),
        "model.width": 16 if name == "lm" else 8 * pick(1, 2),
        "model.depth": depth,
        "model.dense_layers": dense_layers,
        "model.moe_every": moe_every,
        "model.heads": heads,
        "model.mlp_width": tensor * pick(1, 3),
        "model.activation": pick("gelu", "swiglu"),
        "model.scan_layers": pick(False, True),
        "model.remat": pick("none", "none", "full", "dots"),
        "model.dtype": pick("float32", "float32", "bfloat16"),
        "moe.num_experts": experts,
        "moe.expert_width": tensor * pick(1, 3),
        "moe.group_size": pick(0, *[size for size in range(1, micro + 1) if micro % size == 0]),
        "moe.dispatch": dispatch,
        "moe.capacity_factor": pick(0.01, 1.05, 100.0, *([] if dispatch in ("einsum", "capacity") else [0.0])),
        "moe.evaluation_capacity_factor": 0.0 if dispatch == "dropless" else pick(0.0, 1.0),
        "moe.receive_factor": pick(1e-3, 0.5, 4.0, 1e30),
        "moe.balance_scope": pick("sequence", "group", "batch"),
        "moe.shared_experts": (shared := pick(0, 0, 2)),
        "moe.shared_gate": bool(shared) and pick(False, True),
        "optimizer.warmup_steps": warmup,
        "optimizer.learning_rate": pick(1e-3, 0.1),
        "optimizer.weight_decay": pick(0.0, 0.1),
        "optimizer.final_fraction": pick(0.0, 1.0),
        "optimizer.b1": pick(0.0, 0.9),
        "optimizer.b2": pick(0.0, 0.99),
        "optimizer.clip_norm": pick(0.0, 0.01, 1.0),
        "compiler.preset": pick("default", "overlap"),
        "wandb.mode": pick("offline", "online"),
    }
    fields |= _vit(pick, fsdp) if name == "vit" else _lm(pick, tensor, heads)
    fields |= router_fields(pick, pick(*ROUTERS), experts)
    return (name, *(f"{path}={value}" for path, value in fields.items()))


def _vit(pick: Any, fsdp: int) -> dict[str, Any]:
    return {
        "model.image_size": pick((8, 8, 1), (8, 4, 3)),
        "model.patch_size": 4,
        "model.num_classes": pick(2, 10),
        "model.pooling": pick("mean", "class_token"),
        "model.representation_width": pick(0, fsdp),
        "model.head_bias": pick(0.0, -2.3),
        "loss": pick("softmax", "sigmoid"),
    }


def _lm(pick: Any, tensor: int, heads: int) -> dict[str, Any]:
    length = pick(1, 6)
    return {
        "model.vocab_size": 8 * pick(1, 2),
        "model.length": length + pick(0, 2),
        "data.length": length,
        "model.kv_heads": pick(0, tensor),
        "model.head_width": pick(0, 4),
        "model.window": pick(0, 1, 3),
        "model.attention_cap": pick(0.0, 5.0),
        "model.rope_scaling.name": pick("none", "linear", "llama3", "yarn"),
        "model.qk_norm": pick("none", "head", "all"),
        "model.attention_bias": pick("none", "qkv", "all"),
        "model.tied_head": pick(False, True),
        "model.logit_cap": pick(0.0, 5.0),
        "model.z_weight": pick(0.0, 0.01),
        "model.loss_chunk": pick(1, 4, 64),
    }


def router_fields(pick: Any, name: str, experts: int) -> dict[str, Any]:
    """Right settings of a router."""
    k = pick(*range(1, min(experts, 4) + 1))
    values: dict[str, Any] = {field: pick(*options) for field, options in ROUTER_FIELDS.get(name, {}).items()}
    if name in WITH_GROUPS:
        groups = pick(*[count for count in range(1, experts + 1) if experts % count == 0])
        each = experts // groups
        values |= {"expert_groups": groups, "groups_per_token": pick(*range(-(-k // each), groups + 1))}
    if name in WITH_MOST:
        values["max_experts"] = pick(0, k, experts)
    if name == "sparse_topk" and values["choice"] == "token":
        values["solver.name"] = pick("threshold", "dykstra", "pav")
    return {"router.name": name, "router.k": k, **{f"router.{name}.{field}": value for field, value in values.items()}}


@st.composite
def mistaken(draw: st.DrawFn) -> tuple[str, ...]:
    """A right config with one mistake."""
    name, *overrides = draw(right())
    model, router = draw(st.sampled_from(list(FILES))), draw(st.sampled_from(list(ROUTER_MISTAKES)))
    kind = draw(st.sampled_from(["any", "any", "router", "model", "k"]))
    if kind == "any":
        return (name, *overrides, *draw(_one_of(MISTAKES)))
    if kind == "model":
        return (model, *_shared(overrides), *draw(_one_of(MODEL_MISTAKES[model], "model.")))
    with_experts = ("model.depth=1", "model.dense_layers=0", "model.moe_every=1", f"router.name={router}")
    if kind == "router" or router in ("soft", "dense"):
        return (name, *overrides, *with_experts, *draw(_one_of(ROUTER_MISTAKES[router], f"router.{router}.")))
    return (name, *overrides, *with_experts, f"router.k={draw(st.sampled_from([0, -1, 1000]))}")


def _one_of(mistakes: dict[str, tuple[Any, ...]], path: str = "") -> st.SearchStrategy[list[str]]:
    every = [f"{path}{field}={value}" for field, values in mistakes.items() for value in values]
    return st.sampled_from(every).map(lambda one: one.split(" --"))


def _shared(overrides: list[str]) -> list[str]:
    """Those that fit every model."""
    blocks = ("width", "depth", "heads", "mlp_width", "moe_every", "dense_layers")
    return [
        one for one in overrides if one.startswith(("mesh", "batch", "moe", *(f"model.{name}=" for name in blocks)))
    ]


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, ...]:
    """A right config with some fields set to anything."""
    name, *overrides = draw(right())
    paths = [".".join(path) for path in _paths(base(name).to_dict())]
    fields = draw(st.lists(st.sampled_from(paths), min_size=1, max_size=2))
    return (name, *overrides, *(f"{field}={draw(st.sampled_from(ANYTHING))}" for field in fields))


@st.composite
def edited(draw: st.DrawFn) -> tuple[str, tuple[tuple[tuple[str, ...], Any], ...]]:
    """A model's name, and entries of its config file's table, by path, that are to be something else."""
    name = draw(st.sampled_from(list(FILES)))
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    lists, tables = st.lists(scalars, max_size=3), st.dictionaries(st.text(max_size=3), scalars, max_size=2)
    paths = st.sampled_from(_paths(base(name).to_dict()))
    return name, tuple(draw(st.lists(st.tuples(paths, scalars | lists | tables), min_size=1, max_size=2)))


def base(name: str) -> ml_collections.ConfigDict:
    """The config file of a model, with every router's table."""
    config = config_lib.load_file(FILES[name])
    config.router = config_lib.load_file(FILES["vit"]).router
    config.router.sparse_topk.solver.pav = {}
    return config


def _paths(table: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Of tables and of fields."""
    inner = [path for name, entry in table.items() if isinstance(entry, dict) for path in _paths(entry, (*above, name))]
    return [*((*above, name) for name in table), *inner]
