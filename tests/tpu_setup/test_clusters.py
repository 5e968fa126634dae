"""The files for GKE and SkyPilot: they say what train.py means, and those projects accept them."""

import shlex
from typing import Any

import pytest
import yaml

from moe import cli
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
    assert recovery["recover_on_exit_codes"] == [cli.STOPPED]
    assert recovery["max_restarts_on_errors"] == 0
    assert shlex.split(task["run"].splitlines()[-1])[:3] == ["exec", ".venv/bin/python", "train.py"]


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
    assert resources.job_recovery["recover_on_exit_codes"] == [cli.STOPPED]
    with pytest.raises(ValueError, match="WORKDIR"):
        sky.Task.from_yaml_config(table)
