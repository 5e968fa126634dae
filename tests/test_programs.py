"""train.py and evaluate.py as a user runs them: whole runs, resumption, evaluation, mistakes in one sentence."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

import evaluate
import train
from moe import cli
from moe import config as config_lib
from moe.checkpoint import Checkpoints
from tests.pages import parse_page

REPOSITORY = Path(__file__).parents[1]
SMALL = [
    "--config=configs/digits.py",
    "--config.model.width=16",
    "--config.model.depth=2",
    "--config.model.moe_every=1",
    "--config.model.patch_size=4",
    "--config.model.heads=2",
    "--config.moe.expert_width=16",
    "--config.moe.num_experts=4",
    "--config.batch_size=72",
    "--config.moe.group_size=9",
    "--config.steps=6",
    "--config.log_every=2",
    "--config.optimizer.warmup_steps=1",
    "--config.checkpoint.every=3",
]


@pytest.fixture(scope="module", autouse=True)
def compile_fast() -> Iterator[None]:
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.getbasetemp() / "datasets"))


def run_train(workdir: Path, *extra: str, small: Sequence[str] = SMALL) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.run(train.main, [*small, f"--workdir={workdir}", *extra])
    return int(exit_info.value.code or 0)


def run_evaluate(workdir: Path, *extra: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.run(evaluate.main, [f"--workdir={workdir}", *extra])
    return int(exit_info.value.code or 0)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(compile_fast: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, undisturbed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    os.chdir(REPOSITORY)
    os.environ["TFDS_DATA_DIR"] = str(tmp_path_factory.getbasetemp() / "datasets")
    assert run_train(workdir) == 0
    return workdir


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to do harm to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_writes_what_the_readme_says(finished: Path) -> None:
    result = read(finished / "result.json")
    assert result["step"] == 6
    assert 0 <= result["test/accuracy"] <= 1
    assert len(str(result["params/sha256"])) == 64
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6]
    last = logged[-1]
    parts = last["train/cross_entropy"] + last["router/importance"] + last["router/load"]
    assert last["train/loss"] == pytest.approx(parts, rel=1e-5)
    for layer in (0, 1):
        for name in ("load_max_to_mean", "dead_experts", "entropy", "overflow", "experts_per_token"):
            assert np.isfinite(last[f"moe/layer_{layer}/{name}"])
        assert last[f"moe/layer_{layer}/experts_per_token"] == 2
    assert last["examples_per_second"] > 0
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert config_lib.resolve(config_lib.from_json((finished / "config.json").read_text())).steps == 6
    assert Checkpoints(finished / "checkpoints").steps() == [3, 6]
    loads = [json.loads(line) for line in (finished / "load.jsonl").read_text().splitlines()]
    assert [line["step"] for line in loads] == [2, 4, 6]
    shares = loads[-1]["load"]
    assert list(shares) == ["layer_0", "layer_1"]
    assert max(shares["layer_1"]) * 4 == pytest.approx(last["moe/layer_1/load_max_to_mean"], rel=1e-3)
    assert read(finished / "environment.json")["jax"] == jax.__version__


def test_a_run_ends_with_a_report_and_evaluation_writes_one(copied: Path) -> None:
    page = parse_page((copied / "report.html").read_text())
    for words in ("softmax, digits", "6 steps of 72 examples", "label 2", "expert 3", jax.__version__):
        assert words in page.text
    (copied / "report.html").unlink()
    assert run_evaluate(copied, "--step=3", "--report") == 0
    assert "Evaluation" in parse_page((copied / "report.html").read_text()).text
    assert read(copied / "evaluation.json")["step"] == 3


def test_resuming_ends_with_bit_identical_parameters(finished: Path, copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints" / "6")
    (copied / "result.json").unlink()
    assert run_train(copied) == 0
    assert read(copied / "result.json") == read(finished / "result.json")
    logged = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "train/loss" in line] == [2, 4, 6]


def test_running_a_finished_run_again_changes_nothing(finished: Path, copied: Path) -> None:
    (copied / "result.json").unlink()
    assert run_train(copied) == 0
    assert read(copied / "result.json") == read(finished / "result.json")


def test_another_mesh_goes_on_from_the_same_checkpoint(
    finished: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "checkpoints" / "6")
    assert run_train(copied, "--config.mesh.data=2", "--config.mesh.expert=4") == 0
    assert "mesh.expert (1 there, 4 now)" in capsys.readouterr().out
    ours, theirs = read(copied / "result.json"), read(finished / "result.json")
    assert ours["test/loss"] == pytest.approx(theirs["test/loss"], rel=1e-5)
    assert run_evaluate(copied) == 0
    assert read(copied / "evaluation.json") == ours
    config = read(copied / "config.json")
    (copied / "config.json").write_text(json.dumps({**config, "mesh": {**config["mesh"], "data": 32}}))
    assert run_evaluate(copied) == 0
    assert "doesn't fill the 8 devices" in capsys.readouterr().out
    assert read(copied / "evaluation.json")["test/loss"] == pytest.approx(ours["test/loss"], rel=1e-6)


def test_evaluation_repeats_the_run_s_own_measure(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_evaluate(copied) == 0
    assert read(copied / "evaluation.json") == read(copied / "result.json")
    assert "test/accuracy" in capsys.readouterr().out
    assert run_evaluate(copied, "--step=3") == 0
    earlier = read(copied / "evaluation.json")
    assert earlier["step"] == 3
    assert earlier["params/sha256"] != read(copied / "result.json")["params/sha256"]


def test_evaluation_under_another_router_uses_the_same_weights(copied: Path) -> None:
    assert run_evaluate(copied, "--config.router.name=sparse_topk") == 0
    other, own = read(copied / "evaluation.json"), read(copied / "result.json")
    assert other["params/sha256"] == own["params/sha256"]
    assert other["test/loss"] != own["test/loss"]


@pytest.mark.parametrize("router", ["sparse_topk:threshold", "sparse_topk:dykstra", "successive_halving"])
def test_one_flag_swaps_the_router(router: str, tmp_path: Path) -> None:
    name, _, solver = router.partition(":")
    extra = [f"--config.router.name={name}", "--config.log_every=1", "--config.optimizer.learning_rate=5e-3"]
    if solver:
        extra.append(f"--config.router.sparse_topk.solver.name={solver}")
    assert run_train(tmp_path / "run", *extra) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_a_run_begins_with_another_and_looks_back_no_more(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begins = f"--config.init_from={copied}"
    wider = ["--config.moe.num_experts=8", "--config.router.k=4"]
    assert run_train(tmp_path / "next", begins, *wider) == 0
    assert f"begins with {copied}/checkpoints/6\n  kept: " in capsys.readouterr().out
    result = read(tmp_path / "next" / "result.json")
    shutil.rmtree(tmp_path / "next" / "checkpoints" / "6")
    assert run_train(tmp_path / "next", "--config.init_from=gone", *wider) == 0
    out = capsys.readouterr().out
    assert "has checkpoints of its own: nothing is taken from init_from = gone" in out
    assert f"init_from ('{copied}' there, 'gone' now)" in out
    assert "resuming from step 3" in out
    assert read(tmp_path / "next" / "result.json") == result
    mistake(
        capsys, run_train(tmp_path / "new", "--config.init_from=gone"), cli.FAILURE, "gone: there is no such folder"
    )
    assert not (tmp_path / "new").exists()


def test_the_config_of_a_workdir_is_a_config(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "config.json"
    table = config_lib.load_file(str(path))
    assert config_lib.to_json(table) == path.read_text()
    assert config_lib.resolve(table).model.width == 16
    path.write_text("{")
    code = run_train(tmp_path / "new", small=[f"--config={path}"])
    mistake(capsys, code, cli.USAGE, "config.json is not valid JSON")


def mistake(capsys: pytest.CaptureFixture[str], code: int, expected_code: int, *parts: str) -> None:
    """The exit code, and one line on stderr with all of `parts`."""
    err = capsys.readouterr().err
    assert code == expected_code, err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("config.rooter.name=softmax", ["'rooter'", "did you mean 'router'"]),
        ("config.optimizer.learning_rat=1", ["learning_rat", "did you mean 'learning_rate'"]),
        ("config.router.name=softmaxx", ["softmaxx", "softmax, sparse_topk, successive_halving"]),
        ("config.router.k=9", ["k = 9", "1..4"]),
        ("config.router.k=0", ["k = 0"]),
        ("config.steps=many", ["steps = 'many'", "int"]),
        ("config.steps=0", ["steps = 0"]),
        ("config.router=softmax", ["router is a table"]),
        ("config.mesh.expert=3", ["expert=3", "8 devices"]),
        ("config.mesh.expert=8", ["mesh.expert = 8", "4 entries"]),
        ("config.batch_size=36", ["36", "8 devices", "multiple of 8"]),
        ("config.moe.group_size=5", ["group_size = 5", "72"]),
        ("config.moe.capacity_factor=-1", ["capacity_factor = -1"]),
        ("config.model.num_classes=7", ["10 classes", "num_classes = 7"]),
        ("config.model.remat=some", ["remat = 'some'", "'none', 'full', 'dots'"]),
        ("config.data.name=no_such_set", ["no_such_set"]),
        ("config.init_from=configs", ["init_from = configs is neither the workdir of a run"]),
        ("config.upcycle.method=clone", ["upcycle.method = 'clone'", "'copy', 'split'"]),
        ("config.router.sparse_topk.solver.name=newton", []),
    ],
)
def test_a_wrong_config_is_one_sentence_and_touches_nothing(
    override: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = [f"--{override}"]
    if "solver" in override:
        extra.append("--config.router.name=sparse_topk")
        parts = ["newton", "threshold, dykstra"]
    code = run_train(tmp_path / "run", *extra)
    mistake(capsys, code, cli.USAGE, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--confg=configs/digits.py"], ["--confg"]),
        (["--config=configs/nothing.py"], ["configs/nothing.py", "configs/digits.py"]),
        (["extra"], ["extra"]),
        (["--config.steps"], ["--config.steps", "needs a value"]),
    ],
)
def test_a_wrong_flag_is_one_sentence(
    argv: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_train(tmp_path / "run", small=argv)
    mistake(capsys, code, cli.USAGE, *parts)


def test_a_config_file_without_get_config_or_with_an_unknown_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("x = 1\n")
    mistake(capsys, run_train(tmp_path / "run", small=[f"--config={path}"]), cli.USAGE, "get_config")
    path.write_text(
        "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'seed': 0, 'stepz': 3})\n"
    )
    mistake(capsys, run_train(tmp_path / "run", small=[f"--config={path}"]), cli.USAGE, "stepz", "'steps'")


def test_a_workdir_of_another_config_is_refused_and_left_as_it_is(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    code = run_train(copied, "--config.router.name=sparse_topk")
    mistake(capsys, code, cli.USAGE, "router.name ('softmax' there, 'sparse_topk' now)", "--workdir")
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_workdir_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    mistake(capsys, run_train(tmp_path / "file" / "run"), cli.FAILURE, str(tmp_path / "file" / "run"), "--workdir")


def test_evaluating_what_is_not_there(tmp_path: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake(capsys, run_evaluate(tmp_path / "nowhere"), cli.FAILURE, "nowhere", "config.json")
    mistake(capsys, run_evaluate(copied, "--step=4"), cli.FAILURE, "step 4", "3, 6")
    mistake(capsys, run_evaluate(copied, "--config.model.width=32"), cli.FAILURE, "16", "32", "doesn't fit")
    shutil.rmtree(copied / "checkpoints")
    mistake(capsys, run_evaluate(copied), cli.FAILURE, "no checkpoints")


def damage(checkpoint: Path) -> None:
    for path in (checkpoint / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    finished: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copied / "checkpoints" / "6")
    mistake(capsys, run_evaluate(copied), cli.FAILURE, "checkpoints/6", "other steps here are 3")
    assert not (copied / "evaluation.json").exists()
    assert run_train(copied) == 0
    output = capsys.readouterr()
    assert f"the other steps here are 3: it is set aside in {copied / 'checkpoints' / '6.damaged'}" in output.err
    assert "resuming from step 3" in output.out
    assert read(copied / "result.json") == read(finished / "result.json")
    for step in (3, 6):
        damage(copied / "checkpoints" / str(step))
    before = sorted(path.name for path in (copied / "checkpoints").iterdir())
    mistake(capsys, run_train(copied), cli.FAILURE, "all 2 checkpoints of", "are damaged, and left as they are")
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == before


def test_help_lists_configs_and_routers_and_a_real_process_exits_with_a_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "train.py", *argv]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)

    shown = call("--help")
    assert shown.returncode == 0
    assert "configs/digits.py" in shown.stdout
    assert "softmax, sparse_topk, successive_halving" in shown.stdout
    wrong = call("--config.rooter.name=softmax", f"--workdir={tmp_path / 'run'}")
    assert wrong.returncode == cli.USAGE
    assert wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("train.py: unknown config field 'rooter'")


def test_overrides_keep_the_type_of_the_field() -> None:
    config = ml_collections.ConfigDict({"a": 1, "b": 1.0, "c": True, "d": "x", "e": (1, 2), "t": {"f": 0}})
    config_lib.override(config, ["a=3", "b=4/3", "c=false", "d=y=z", "e=(3,4)", "t.f=-1"])
    assert config.to_dict() == {"a": 3, "b": 4 / 3, "c": False, "d": "y=z", "e": (3, 4), "t": {"f": -1}}


def test_the_hash_sees_every_parameter(finished: Path) -> None:
    from moe.metrics import params_sha256

    tree = {"a": jax.numpy.ones((2, 3)), "b": {"c": jax.numpy.zeros(4)}}
    base = params_sha256(tree)
    assert params_sha256({"b": tree["b"], "a": tree["a"]}) == base
    assert params_sha256({**tree, "a": tree["a"].at[1, 2].set(1 + 1e-7)}) != base
    assert params_sha256({**tree, "a": tree["a"].reshape(3, 2)}) != base


def test_what_is_interrupted_ends_with_its_sentence_whatever_the_exit_would_do() -> None:
    """A stand-in for XLA, which crashes in an exit that interrupts its compilation."""
    script = """
import atexit, os
from moe import cli
def main(argv):
    print("so far")
    raise KeyboardInterrupt
atexit.register(os._exit, 139)
cli.run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == cli.INTERRUPTED == 130
    assert done.stdout == "so far\n"
    assert done.stderr.count("\n") == 1
    assert "interrupted" in done.stderr
