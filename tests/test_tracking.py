"""Weights & Biases with a stand-in for the package: what it is told, and that a run never depends on it."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe import config as config_lib
from moe.metrics import MetricsWriter
from moe.tracking import Tracker, WandbConfig


class StandIn(ModuleType):
    """What of the package is used; keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.broken = ""

    def init(self, **arguments: Any) -> "StandIn":
        self._break("init")
        self.inits.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self._break("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self._break("finish")
        self.finished += 1

    def _break(self, where: str) -> None:
        if self.broken == where:
            raise RuntimeError("no\nnetwork")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


ON = WandbConfig("experts", "offline")


def write(workdir: Path, config: WandbConfig, *steps: int) -> None:
    writer = MetricsWriter(workdir, steps[0] - 1, Tracker(config, {"seed": 3}, workdir))
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / step})
    writer.close()


def test_a_run_started_again_goes_on_as_the_same_run_there(wandb: StandIn, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", ON, 1, 2)
    write(tmp_path / "run", ON, 3)
    first, second = wandb.inits
    assert first == second
    assert first["id"] == json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    assert (first["project"], first["mode"], first["resume"]) == ("experts", "offline", "allow")
    assert (first["name"], first["dir"], first["config"]) == ("run", str(tmp_path / "run"), {"seed": 3})
    assert wandb.logged == [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5}), (3, {"train/loss": 1 / 3})]
    assert wandb.finished == 2
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", ON, 1)
    assert wandb.inits[2]["id"] != first["id"]


def test_without_a_project_nothing_is_imported_or_written(wandb: StandIn, tmp_path: Path) -> None:
    write(tmp_path, WandbConfig(), 1)
    assert wandb.inits == []
    assert not (tmp_path / "wandb.json").exists()


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_what_goes_wrong_there_is_said_once_and_the_numbers_are_kept(
    where: str, wandb: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.broken = where
    write(tmp_path, ON, 1, 2)
    err = capsys.readouterr().err
    assert err == "the run goes on without Weights & Biases: RuntimeError: no network\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_damaged_id_becomes_a_new_one(wandb: StandIn, tmp_path: Path) -> None:
    for text in ("{", '{"id": "../x"}', "[" * 100_000):
        (tmp_path / "wandb.json").write_text(text)
        write(tmp_path, ON, 1)
        assert json.loads((tmp_path / "wandb.json").read_text())["id"] == wandb.inits[-1]["id"]


def test_a_project_without_the_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb.project = 'experts' needs wandb, .*pip install 'moe-jax\[wandb\]'"):
        ON.check()
    WandbConfig().check()


def test_a_config_of_somebody_else_sends_nothing(tmp_path: Path) -> None:
    table = config_lib.load_file("configs/digits.py")
    config_lib.override(table, ["wandb.project=theirs", "wandb.mode=online"])
    path = tmp_path / "config.json"
    path.write_text(config_lib.to_json(table))
    assert config_lib.resolve(config_lib.load_file(str(path))).wandb.project == ""
