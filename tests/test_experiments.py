"""The parts of the experiments' recipes do what these say, and each runs to a table when it is tiny."""

import dataclasses
import functools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from experiments import common, pooling, pruning, routers, topk_loss
from experiments.common import Sample
from moe import config as config_lib


def test_means_errors_and_differences_are_those_of_the_seeds() -> None:
    rows = common.to_rows([Sample("a", "c", "u", [1.0, 2.0, 6.0]), Sample("b", "c", "u", [2.0, 2.0, 8.0])], ["a"])
    found = {row["name"]: row for row in rows}
    assert found["b"]["value"] == 4
    assert found["b"]["ratio"] == pytest.approx(4 / 3)
    assert found["a, standard error"]["value"] == pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5)
    assert found["b, paired difference"]["value"] == 1
    assert found["b, standard error of that"]["value"] == pytest.approx(np.std([1, 0, 2], ddof=1) / 3**0.5)
    assert found["b, seed 2"]["value"] == 8
    assert "a, paired difference" not in found


def test_a_single_seed_has_no_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        common.parse(common.parser(""), ["--seeds=1"])
    assert "a standard error takes at least 2." in capsys.readouterr().err
    assert common.plus_minus([0.5], "+") == "+0.5"


# Pruning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", pruning.ZEROS)
def test_hard_pruning_leaves_exactly_the_wanted_share(zeros: float) -> None:
    layers, counts = pruning.init(jax.random.key(0)), pruning.kept(zeros)
    for (w, _), k in zip(pruning.pruned(pruning.hard, layers, counts, 0.0), counts, strict=True):
        assert np.count_nonzero(w) == k
        assert 1 - k / w.size == pytest.approx(zeros, abs=0.5 / w.size)


def test_zeros_that_rise_begin_with_none_and_end_at_their_share() -> None:
    w = jax.random.normal(jax.random.key(0), (1000,))
    counts = [int(np.count_nonzero(pruning.straight_through_gradually(w, 20, s))) for s in (1.0, 0.5, 0.0)]
    assert counts == [1000, 141, 20]


@pytest.mark.parametrize("name", ["sparse, p = 2, strength 1", "sparse, p = 4/3, strength 1 to .001"])
def test_sparse_pruning_keeps_the_largest_and_ends_at_the_wanted_share(name: str) -> None:
    w = jax.random.normal(jax.random.key(0), (1000,)) / 8
    method = pruning.METHODS[name]
    kept = method.prune(w, 50, jnp.asarray(method.strengths[0])) != 0
    assert np.abs(w)[kept].min() > np.abs(w)[~kept].max()
    assert kept.sum() > 50
    assert np.count_nonzero(method.prune(w, 50, jnp.asarray(1e-3))) <= 51


def test_gradients_reach_the_weights_that_each_method_promises() -> None:
    image, label = jax.tree.map(lambda x: x[:64], common.digits()[0])
    layers, counts = pruning.init(jax.random.key(0)), pruning.kept(0.9)
    shares = {}
    some = [pruning.HARD, pruning.STRAIGHT, "sparse, p = 2, strength 30 to .001"]
    for name, method in ((name, pruning.METHODS[name]) for name in some):
        strength = jnp.asarray(method.strengths[0])
        gradient = jax.grad(pruning.loss)(layers, method, counts, strength, (image.reshape(64, -1), label))
        shares[name] = float(np.mean(np.asarray(gradient[1][0]) != 0))
    # What a matrix's kept weights can't have is a gradient from units that are silent for all examples.
    assert shares[pruning.HARD] <= 0.1001
    assert shares[some[2]] > 2 * shares[pruning.HARD] < shares[pruning.STRAIGHT]
    exact, straight = (pruning.pruned(p, layers, counts, 0.0)[1][0] for p in (pruning.hard, pruning.straight_through))
    np.testing.assert_allclose(exact, straight, atol=1e-6)


def test_pruning_runs_to_a_table() -> None:
    found = pruning.samples(seeds=2, steps=30, zeros=[0.5], names=[pruning.DENSE, pruning.STRAIGHT])
    pruned = ("hard, after dense training", pruning.STRAIGHT)
    assert {(sample.case, sample.name) for sample in found} == {
        ("no zeros", "dense"),
        *(("50 % zeros", name) for name in pruned),
    }
    assert all(len(sample.values) == 2 for sample in found)
    assert np.mean(next(sample.values for sample in found if sample.name == "dense")) > 0.5
    assert f"| 50 % zeros | {pruning.STRAIGHT} |" in common.table(found, [pruning.STRAIGHT])


# The top-k loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "p"), [(1, 4 / 3), (3, 4 / 3), (3, 2)])
def test_the_topk_loss_is_the_papers(k: int, p: float) -> None:
    strength, logits = 0.7, np.random.default_rng(0).normal(size=(5, 10))
    label = np.array([int(row.argsort()[-1 - i]) for i, row in enumerate(logits)])

    def masks(row: np.ndarray, tau: float) -> np.ndarray:
        return np.clip((row - tau) / strength, 0, 1) ** (1 / (p - 1))

    expected = []
    for row, entry in zip(logits, label, strict=True):
        tau = brentq(lambda tau, row=row: masks(row, tau).sum() - k, row.min() - strength, row.max(), xtol=1e-14)
        expected.append(1 - masks(row, tau)[entry])
    found = functools.partial(topk_loss.topk_loss, k=k, strength=strength, p=p)
    assert found(jnp.asarray(logits), jnp.asarray(label)) == pytest.approx(np.mean(expected), abs=1e-5)
    assert 0 < np.mean(expected) < 1


def test_a_label_far_below_the_threshold_or_among_the_best_gets_no_gradient() -> None:
    logits = jnp.array([[9.0, 8.0, 7.0, 0.0, -9.0]])
    slope = jax.grad(functools.partial(topk_loss.topk_loss, k=3, strength=1.0, p=4 / 3))
    for label, has_gradient in ((0, False), (4, False)):
        assert bool(jnp.any(slope(logits, jnp.array([label])) != 0)) == has_gradient
    assert jnp.all(slope(jnp.array([[9.0, 8.0, 7.2, 7.0, -9.0]]), jnp.array([3]))[0, 2:4] != 0)


def test_pairs_of_digits_are_labelled_by_both() -> None:
    fit, _ = common.digits()
    image, label = topk_loss.draw(jax.random.key(0), fit, 6, 2)
    assert image.shape == (6, 8, 16, 1)
    for one, number in zip(image, label, strict=True):
        for half, digit in ((one[:, :8], number // 10), (one[:, 8:], number % 10)):
            index = int(jnp.argmin(jnp.sum(jnp.abs(fit[0] - half[None]), axis=(1, 2, 3))))
            np.testing.assert_array_equal(fit[0][index], half)
            assert fit[1][index] == digit


def test_the_topk_loss_runs_to_a_table() -> None:
    task = topk_loss.Task(1, 4, (3, 2), 20)
    losses = {name: topk_loss.LOSSES[name] for name in (topk_loss.CROSS_ENTROPY, "top-3 loss, p = 2, strength 5")}
    found = topk_loss.samples(2, {"tiny": task}, losses)
    values = {(sample.name, sample.unit): sample.values for sample in found}
    assert len(found) == 6
    for name in (topk_loss.BEFORE, *losses):
        top_1, top_3 = values[name, "top-1 accuracy"], values[name, "top-3 accuracy"]
        assert all(0 <= a <= b <= 1 for a, b in zip(top_1, top_3, strict=True))


# Pooling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, pool in pooling.METHODS.items() if pool])
def test_pooling_leaves_as_many_rows_as_it_should_and_passes_gradients(name: str) -> None:
    pool = pooling.METHODS[name]
    assert pool is not None
    rows = jax.random.normal(jax.random.key(0), (2, 16, 4))
    scores = jax.nn.sigmoid(jax.random.normal(jax.random.key(1), (2, 16)))
    pooled, pull = jax.vjp(lambda rows, scores: pool(rows, scores, 8), rows, scores)
    assert pooled.shape == (2, 8, 4)
    d_rows, d_scores = pull(jnp.ones_like(pooled))
    assert bool(jnp.any(d_rows != 0))
    assert bool(jnp.any(d_scores != 0)) == (name != "means of neighbours")


def test_no_file_is_trained_on_and_tested_on_and_tests_are_always_the_same() -> None:
    texts = pooling.read_texts(64, tests=5)
    again = pooling.read_texts(64, tests=5)
    np.testing.assert_array_equal(texts.text, again.text)
    assert len(texts.train) == texts.label.max() + 1 >= 5
    assert texts.text.shape == (len(texts.label), 64)
    text, label = pooling.draw(texts, seed=0, steps=2, length=64)
    assert text.shape == (2, pooling.BATCH, 64)
    for cut, package in zip(text[0], label[0], strict=True):
        assert cut.tobytes() in texts.train[package].tobytes()
    assert texts.text[0].tobytes() not in texts.train[0].tobytes()


def test_pooling_runs_to_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [pooling.NONE, "halving, base 20"]
    monkeypatch.setattr(pooling, "METHODS", {name: pooling.METHODS[name] for name in names})
    config = dataclasses.replace(pooling.CONFIG, width=8, depth=2, mlp_width=8)
    found = pooling.samples(seeds=2, steps=2, length=16, tests=2, config=config)
    assert {(sample.name, sample.unit) for sample in found} == {
        (name, unit) for name in names for unit in ("accuracy", "ms of a training step", "ms of a prediction")
    }


# Routers ------------------------------------------------------------------------------------------------------------


def test_runs_that_have_ended_are_not_run_again_unless_they_were_of_another_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[Sequence[str]] = []

    def train(command: Sequence[str], **_: object) -> None:
        commands.append(command)
        folder = Path(next(part for part in command if part.startswith("--workdir=")).removeprefix("--workdir="))
        table = config_lib.load_file("configs/digits.py")
        fields = (part.removeprefix("--config.") for part in command if part.startswith("--config."))
        config_lib.override(table, list(fields))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config_lib.to_json(table))
        result = {"step": 5, "test/accuracy": len(commands) / 10, "test/loss": 1.0}
        (folder / "result.json").write_text(json.dumps(result))
        lines = [{"step": step, "train/loss": 1.0, "moe/layer_1/experts_per_token": min(step, 2)} for step in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    monkeypatch.setattr(subprocess, "run", train)

    def samples(*overrides: str) -> dict[tuple[str, str], Sequence[float]]:
        arms = routers.make_arms(2, 5, "configs/digits.py", tmp_path, overrides)
        routers.train(arms)
        return {(sample.name, sample.unit): sample.values for sample in routers.samples(arms, "digits")}

    found = samples()
    assert samples() == found
    assert len(commands) == 2 * len(routers.ARMS)
    assert found["sparse_topk", "accuracy"] == [0.3, 0.7]
    assert found["softmax", "experts per token"] == [2.0, 2.0]
    assert "--config.router.k=3" in commands[1]
    assert "--config.router.name=sparse_topk" in commands[2]
    assert "--config.seed=1" in commands[-1]
    changed = samples("moe.capacity_factor=2")
    assert len(commands) == 4 * len(routers.ARMS)
    assert changed["sparse_topk", "accuracy"] == [1.1, 1.5]


def test_the_interval_is_of_other_images_and_pairs_them() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.random((5, 400)) < 0.9, rng.random((5, 400)) < 0.8
    mean, low, high = routers.interval(ours, theirs)
    difference = ours.mean(axis=0) - theirs.mean(axis=0)
    assert mean == pytest.approx(ours.mean() - theirs.mean())
    half = 1.96 * difference.std() / 20
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.1 * half)
    assert routers.interval(ours, ours) == (0, 0, 0)


@pytest.mark.parametrize("module", [pruning, topk_loss, pooling, routers])
def test_each_says_how_it_is_run(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert f"python -m {module.__name__} [--seeds=5]" in capsys.readouterr().out
