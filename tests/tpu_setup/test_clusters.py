"""The files for GKE and SkyPilot: they say what train.py means, and those projects accept them."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe import cli
from moe.watchdog import STUCK
from tests.tpu_setup.conftest import REPOSITORY

FOLDER = REPOSITORY / "tpu_setup"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def job_of(jobset: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]


def test_the_jobset_restarts_what_a_new_start_mends() -> None:
    jobset = load("gke/jobset.yaml")
    job = job_of(jobset)["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # A failure that this rule names ends the set, any other starts it again.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, 2]}
    assert {cli.FAILURE, cli.USAGE} == set(rule["onExitCodes"]["values"])
    assert cli.STOPPED not in rule["onExitCodes"]["values"]
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"name": "wrongCommand", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    # 4x4 chips, four on a host.
    assert job["parallelism"] == job["completions"] == 16 // container["resources"]["limits"]["google.com/tpu"]


def test_skypilot_recovers_what_a_new_start_mends() -> None:
    task = load("skypilot.yaml")
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [STUCK, cli.STOPPED]
    assert recovery["max_restarts_on_errors"] == 0
    assert shlex.split(task["run"].splitlines()[-1])[:3] == ["exec", ".venv/bin/python", "train.py"]


def test_skypilot_passes_the_variables_on_as_words(tmp_path: Path) -> None:
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    environment = {
        **os.environ,
        "WORKDIR": "gs://b/a b/$(touch canary)`touch canary`;touch canary",
        "TRAIN": "--config=c.py --config.x=* $(touch canary) `touch canary` ; touch canary",
    }
    run = ["bash", "-c", load("skypilot.yaml")["run"]]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    words = environment["TRAIN"].split()
    assert done.stdout.splitlines() == ["train.py", f"--workdir={environment['WORKDIR']}", *words]
    assert not (tmp_path / "canary").exists()


@pytest.mark.clusters
def test_kubernetes_accepts_the_job() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install 'moe-jax[clusters]'")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job_of(load("gke/jobset.yaml"))}
    kubernetes_validate.validate(job, "1.30", strict=True)
    job["spec"]["paralelism"] = 4
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        kubernetes_validate.validate(job, "1.30", strict=True)


@pytest.mark.clusters
@pytest.mark.filterwarnings("ignore")
def test_skypilot_accepts_the_task() -> None:
    sky = pytest.importorskip("sky", reason="pip install 'moe-jax[clusters]'")
    table = load("skypilot.yaml")
    task = sky.Task.from_yaml_config({**table, "envs": {**table["envs"], "WORKDIR": "gs://b/runs/x"}})
    (resources,) = task.resources
    assert resources.use_spot
    assert resources.job_recovery["recover_on_exit_codes"] == [STUCK, cli.STOPPED]
    with pytest.raises(ValueError, match="WORKDIR"):
        sky.Task.from_yaml_config(table)
