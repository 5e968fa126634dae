"""Tables that configs share, each with its usual values; what a config says otherwise is given by name."""

from typing import Any

import ml_collections


def new_config(**changes: Any) -> ml_collections.ConfigDict:
    """A config with the fields of a run; the tables of its parts are the config's own."""
    fields = {
        "seed": 0,
        "accumulation_steps": 1,
        "label_smoothing": 0.0,
        "loss": "softmax",
        "init_from": "",
        "compiler": {"preset": "default", "options": (), "cache": ""},
        "guard": {"spike": 10.0, "window": 128, "abort_after": 10},
        "watchdog_minutes": 30.0,
        "upcycle": {"method": "copy", "noise": 0.0, "drop": 0.0, "output_scale": 1.0},
    }
    return ml_collections.ConfigDict(fields | changes)


def checkpoint(**changes: Any) -> dict[str, Any]:
    """The fields of `checkpoint`."""
    fields = {"every": 500, "minutes": 0.0, "keep": 3, "keep_best": 0, "best": "loss", "background": True}
    return fields | changes


def softmax(**changes: Any) -> dict[str, Any]:
    """The fields of the router `softmax`, without noise and losses."""
    fields = {
        "noise": 0.0,
        "jitter": 0.0,
        "renormalize": True,
        "batch_priority": False,
        "expert_groups": 1,
        "groups_per_token": 1,
        "importance_weight": 0.0,
        "load_weight": 0.0,
        "balance_weight": 0.0,
        "z_weight": 0.0,
        "entropy_weight": 0.0,
    }
    return fields | changes


def experts(**changes: Any) -> dict[str, Any]:
    """The fields of `moe` but for number and width of the experts."""
    fields = {
        "dispatch": "auto",
        "evaluation_capacity_factor": 0.0,
        "receive_factor": 4.0,
        "balance_scope": "group",
        "shared_experts": 0,
        "shared_gate": False,
    }
    return fields | changes


def rope_scaling() -> dict[str, Any]:
    """Rotary positions as they are, and the scalings to choose from (`moe.ops.rope`)."""
    return {
        "name": "none",
        "linear": {"factor": 1.0},
        "llama3": {"factor": 8.0, "low_turns": 1.0, "high_turns": 4.0, "original_length": 8192},
        "yarn": {
            "factor": 4.0,
            "fast_turns": 32.0,
            "slow_turns": 1.0,
            "original_length": 4096,
            "truncate": True,
            "attention": 0.0,
        },
    }
