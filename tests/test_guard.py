"""Updates that would do harm: left out inside the step, counted, written down, and looked into afterwards."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import replay
import train
from moe import cli
from moe.data import pipeline
from moe.guard import GuardConfig, GuardState, init_guard, judge
from moe.parallel.mesh import MeshConfig, make_mesh
from tests.test_programs import compile_fast, in_repository, mistake, read, run_train  # noqa: F401, fixtures
from tests.test_step import CONFIG, make_batch

BATCH = 72


def follow(config: GuardConfig, steps: list[tuple[float, float]]) -> Iterator[tuple[bool, GuardState]]:
    state = init_guard(config)
    step = jax.jit(lambda state, loss, norm: judge(config, state, loss, norm))
    for loss, norm in steps:
        verdict = step(state, np.float32(loss), np.float32(norm))
        state = verdict.state
        yield bool(verdict.is_good), state


def expected(config: GuardConfig, steps: list[tuple[float, float]]) -> list[bool]:
    """By the definition, in float64, with the last accepted values in a list."""
    accepted: list[tuple[float, float]] = []
    verdicts = []
    for values in steps:
        good = bool(np.isfinite(values).all())
        if good and config.spike and len(accepted) >= config.window:
            last = np.array(accepted[-config.window :])
            spread = np.maximum(last.std(axis=0), 0.01 * np.abs(last.mean(axis=0)))
            good = bool(np.all(np.array(values) <= last.mean(axis=0) + config.spike * spread))
        if good:
            accepted.append(values)
        verdicts.append(good)
    return verdicts


def test_what_is_left_out_is_the_definition() -> None:
    config = GuardConfig(spike=3.0, window=8)
    draw = np.random.default_rng(0)
    steps = [tuple(pair) for pair in np.abs(draw.normal(4, 1, (200, 2)))]
    for step, pair in {20: (np.nan, 4), 21: (4, np.inf), 60: (9, 4), 61: (4, 9), 62: (9, 9), 130: (-np.inf, 4)}.items():
        steps[step] = pair
    found = list(follow(config, steps))
    assert [good for good, _ in found] == expected(config, steps)
    assert not any(found[step][0] for step in (20, 21, 60, 61, 62, 130))
    assert found[62][1].in_a_row == 3
    state = found[-1][1]
    assert state.accepted + state.skipped == 200
    assert sum(good for good, _ in found) == state.accepted
    for spike, verdicts in ((0.0, [True, True]), (10.0, [True, False])):
        rule = GuardConfig(spike=spike, window=8)
        assert [good for good, _ in follow(rule, [(1, 1)] * 9 + [(1.09, 1), (1e30, 1e30)])][-2:] == verdicts


def test_there_is_no_bound_before_there_are_enough_values() -> None:
    config = GuardConfig(spike=1.0, window=4)
    assert [good for good, _ in follow(config, [(1, 1), (9, 1), (1, 9), (2, 2), (50, 1)])] == [True] * 4 + [False]


@pytest.mark.parametrize("fields", [{"spike": -1.0}, {"window": 1}, {"abort_after": -1}])
def test_settings_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"guard\.spike = .* and guard\.window"):
        GuardConfig(**fields)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, fsdp=2, expert=2)], ids=["one", "eight"])
@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
def test_a_bad_step_changes_nothing_but_counts(mesh: MeshConfig, apart: bool) -> None:
    """The next good one goes on from there; the host isn't asked."""
    config = dataclasses.replace(CONFIG, mesh=mesh, model=dataclasses.replace(CONFIG.model, scan_layers=not apart))
    devices = make_mesh(mesh, jax.devices() if mesh.fsdp > 1 else jax.devices()[:1])
    step = train.make_step(config, devices)
    good = make_batch()
    bad = {**good, "image": np.where(np.arange(len(good["image"]))[:, None, None, None] == 3, np.nan, good["image"])}
    bad["image"] = bad["image"].astype(np.float32)

    def arrays(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return train.to_devices(batch, ("image", "label"), devices)

    compiled = step.loop.train.lower(step.loop.abstract_state, step.abstract_batch).compile()
    assert "callback" not in compiled.as_text()
    state, metrics = compiled(step.loop.enter(step.init(jax.random.key(3))), arrays(good))
    before = jax.device_get(step.loop.leave(state))
    state, metrics = compiled(state, arrays(bad))
    after = jax.device_get(step.loop.leave(state))
    assert metrics["guard"] == {"skipped": 1, "skipped_in_a_row": 1, "nonfinite": 1, "spike": 0}
    assert np.isnan(metrics["blocks"]["rms"]).all()
    names = ("variables", "opt_state", "key")
    for old, new in zip(
        *(jax.tree.leaves([getattr(one, name) for name in names]) for one in (before, after)), strict=True
    ):
        assert old.tobytes() == new.tobytes()
    assert (after.step, after.guard.skipped, after.guard.accepted) == (2, 1, 1)
    state, metrics = compiled(state, arrays(good))
    assert metrics["guard"]["skipped"] == 1
    assert metrics["guard"]["skipped_in_a_row"] == 0
    moved = jax.device_get(step.loop.leave(state))
    assert not np.array_equal(moved.variables.params["head"]["kernel"], after.variables.params["head"]["kernel"])


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """Makes the images at these places of the training sequence not numbers."""
    read_train = pipeline._read_train

    def poison(places: range) -> None:
        def read(batch: dict[str, np.ndarray], **settings: Any) -> dict[str, np.ndarray]:
            rows = read_train(batch, **settings)
            wrong = np.isin(batch["position"], places)
            return {**rows, "image": np.where(wrong[:, None, None, None], np.float32("nan"), rows["image"])}

        monkeypatch.setattr(pipeline, "_read_train", read)

    return poison


def test_bad_examples_cost_their_steps_and_are_named(
    poisoned: Callable[[range], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(range(3 * BATCH + 5, 3 * BATCH + 6))
    workdir = tmp_path / "run"
    assert run_train(workdir) == 0
    err = capsys.readouterr().err
    assert "step 4: loss nan, gradient norm nan, and the first output that isn't finite is that of block 0" in err
    assert "its update is left out (1 so far)" in err
    (line,) = (json.loads(line) for line in (workdir / "bad_steps.jsonl").read_text().splitlines())
    assert line["step"] == 4
    assert len(line["examples"]) == BATCH
    assert line["examples"][5].startswith("train[")
    assert np.isfinite(read(workdir / "result.json")["test/loss"])
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["guard/skipped"] for line in logged if "train/loss" in line] == [0, 1, 1]

    with (workdir / "bad_steps.jsonl").open("a") as file:
        file.write('{"step": 5, "rea')
    capsys.readouterr()
    assert run_replay(workdir) == 0
    assert "step 4, from" in capsys.readouterr().out
    (workdir / "bad_steps.jsonl").unlink()
    mistake(capsys, run_replay(workdir), cli.FAILURE, "no update of", "--step")
    mistake(capsys, run_replay(workdir, "--step=7"), cli.USAGE, "--step=7 must be one of the run's steps, 1 to 6")
    mistake(capsys, run_replay(tmp_path / "nowhere"), cli.FAILURE, "nowhere")


def test_a_run_gives_up_with_everything_saved_and_its_step_can_be_replayed(
    poisoned: Callable[[range], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(range(3 * BATCH, 10**6))
    workdir = tmp_path / "run"
    assert run_train(workdir, "--config.guard.abort_after=3", "--config.checkpoint.every=0") == cli.FAILURE
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert "3 updates in a row were left out (guard.abort_after = 3), up to step 6; step 4: loss nan" in last
    assert f"replay.py --workdir={workdir} --step=4" in last
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()] == ["6"]

    assert run_replay(workdir, "--debug-nans") == 0
    out = capsys.readouterr().out
    assert "step 4, from checkpoint 6\n" in out
    assert "made at: moe/models/vit.py, line " in out
    assert f"{BATCH * 64} not finite" in out
    assert "the first output that isn't finite is that of block 0" in out
    assert run_replay(workdir, "--step=2", "--debug-nans") == 0
    out = capsys.readouterr().out
    assert "step 2, from the beginning, steps 1 to 1 run again" in out
    assert "everything is finite\nmade at: no operation gives a number that isn't finite" in out
    (loss,) = (line for line in out.splitlines() if line.startswith("loss "))
    logged = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert float(loss.split()[1].rstrip(",")) == pytest.approx(logged["train/loss"], rel=1e-5)


def run_replay(workdir: Path, *extra: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.run(replay.main, [f"--workdir={workdir}", *extra])
    return int(exit_info.value.code or 0)


def test_a_collapsed_router_is_said_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from moe.watch import Watch

    watch = Watch(CONFIG, tmp_path, lambda place: [])
    experts = CONFIG.moe.num_experts
    fine = {"moe/layer_1/dead_experts": 0.0, "moe/layer_1/experts_per_token": 2.0, "moe/layer_1/entropy": 1.0}
    dead = fine | {"moe/layer_1/dead_experts": float(experts - 1)}
    flat = fine | {"moe/layer_1/entropy": 1e-4}
    said = []
    for values in (fine, dead, dead, fine, flat):
        watch._look_at_routers(7, values)
        said.append(capsys.readouterr().err)
    assert [bool(text) for text in said] == [False, True, False, False, True]
    assert f"the router of layer 1 has collapsed: {experts - 1} of {experts} experts get no token" in said[1]
    assert "entropy of its choices is 0.0001 nats" in said[4]
