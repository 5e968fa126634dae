"""The benchmarks start by path and as modules, and what they compare computes the same thing."""

import functools
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import moe_layer, torch_layers, torch_models, train_step
from benchmarks.train_step import Case

ROOT = Path(__file__).parents[1]
TOKENS = 64


@pytest.mark.parametrize("how", ["path", "module"])
def test_starts_by_path_and_as_a_module(how: str, tmp_path: Path) -> None:
    command, folder = {
        "path": ([str(ROOT / "benchmarks" / "moe_layer.py")], tmp_path),
        "module": (["-m", "benchmarks.moe_layer"], ROOT),
    }[how]
    done = subprocess.run([sys.executable, *command, "--help"], cwd=folder, capture_output=True, text=True, check=True)
    assert "--json" in done.stdout


@pytest.mark.parametrize("skewed", [False, True])
def test_choices_are_queued_first_choices_first_in_every_group(skewed: bool) -> None:
    expert_TK = moe_layer.choices(TOKENS, skewed)
    rows = jax.tree.map(np.asarray, moe_layer.assignments(expert_TK, groups=4))
    assert rows.token.shape == (4, TOKENS // 4 * moe_layer.K)
    tokens = np.arange(TOKENS).reshape(4, -1)
    np.testing.assert_array_equal(tokens[np.arange(4)[:, None], rows.token], np.tile(tokens, moe_layer.K))
    np.testing.assert_array_equal(rows.expert, np.hstack([expert_TK[tokens, rank] for rank in range(moe_layer.K)]))
    share = np.mean(moe_layer.choices(4096, skewed) == 0)
    assert share == pytest.approx(moe_layer.SKEW if skewed else 1 / moe_layer.EXPERTS, abs=0.02)


def test_training_steps_are_compared_with_a_twin_of_equal_active_flops() -> None:
    case = Case(width=16, depth=1, experts=2, hidden=8, k=1, heads=2, kv_heads=1, length=8, batch=2)
    table = train_step.speeds("tiny", case, torch_models.NAMES, time.perf_counter, seconds=0.0)
    rows = {row["name"]: row for row in table}
    assert set(rows) >= {"moe", "moe_dropless", "dense", "moe, share of peak"}
    assert rows["dense"]["ratio"] == 1
    assert rows["moe / dense"]["value"] == pytest.approx(rows["moe"]["ratio"])
    # The gate is all that the twin hasn't.
    gate = 3 * 2 * case.batch * case.length * case.depth * case.width * case.experts
    assert case.flops(dense=False) - case.flops(dense=True) == gate


@pytest.mark.parity
@pytest.mark.parametrize("skewed", [False, True])
def test_the_layers_of_torch_compute_what_ours_do(skewed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch_layers.MISSING:
        pytest.fail(f"{' and '.join(torch_layers.MISSING)} should come with the extra parity")
    monkeypatch.setattr(moe_layer, "WIDTH", 16)
    experts, dense = moe_layer.weights(24, moe_layer.EXPERTS), moe_layer.weights(48, None)
    x = jax.random.normal(jax.random.key(0), (TOKENS, 16))
    expert_TK = moe_layer.choices(TOKENS, skewed)
    routing = moe_layer.assignments(expert_TK, groups=1)
    theirs = torch_layers.layers(*jax.tree.map(np.array, (x, expert_TK, experts, dense)))

    total, (dx, dw) = moe_layer.compiled(moe_layer.dense_layer, x, dense, None)(x, dense, None)
    got = [np.asarray(part.detach()) for part in theirs["torch_dense"]()]
    for ours, their in zip([total, dx, *jax.tree.leaves(dw)], got, strict=True):
        np.testing.assert_allclose(their, ours, rtol=1e-4, atol=1e-4)

    dropless = functools.partial(moe_layer.moe_layer, moe_layer.LAYERS["dropless"])
    total, (dx, dw) = moe_layer.compiled(dropless, x, experts, routing)(x, experts, routing)
    gate_up = np.concatenate([dw["w_gate"], dw["w_in"]], axis=2).swapaxes(1, 2)
    for name in ("hf_eager", "hf_grouped_mm"):
        got = [np.asarray(part.detach()) for part in theirs[name]()]
        for ours, their in zip([total, dx, gate_up, np.swapaxes(dw["w_out"], 1, 2)], got, strict=True):
            np.testing.assert_allclose(their, ours, rtol=1e-4, atol=1e-4, err_msg=name)
