"""What a process makes of its environment, and of a signal; real processes stand in tests/test_processes.py."""

import os
import signal

import jax
import numpy as np
import pytest

from moe.parallel import hosts
from moe.parallel.mesh import MeshConfig, batch_sharding, local_rows, make_mesh, to_global


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What jax.distributed.initialize is called with."""
    calls: list[dict] = []
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return calls


def test_alone_a_process_joins_nobody(joined: list[dict]) -> None:
    hosts.initialize()
    assert joined == []


def test_variables_say_who_the_processes_are(joined: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COORDINATOR_ADDRESS": "host:1234", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    hosts.initialize()
    assert joined == [{"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}]


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_is_left_to_jax(name: str, joined: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    hosts.initialize()
    assert joined == []
    monkeypatch.setenv(name, "2")
    hosts.initialize()
    assert joined == [{}]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NUM_PROCESSES": "4", "PROCESS_ID": "1"}, "set all three or none"),
        ({"COORDINATOR_ADDRESS": "host:1", "NUM_PROCESSES": "4"}, "set all three or none"),
        ({"COORDINATOR_ADDRESS": "host:1", "NUM_PROCESSES": "four", "PROCESS_ID": "1"}, "set all three or none"),
        ({"COORDINATOR_ADDRESS": "host:1", "NUM_PROCESSES": "4", "PROCESS_ID": "4"}, "PROCESS_ID = 4 must be below"),
    ],
)
def test_half_of_the_variables_is_a_mistake(
    variables: dict[str, str], message: str, joined: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(ValueError, match=message):
        hosts.initialize()
    assert joined == []


def test_processes_that_do_not_answer_are_named(joined: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED:\n barrier")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ConnectionError, match=r"didn't find each other .*: DEADLINE_EXCEEDED: barrier$"):
        hosts.initialize()


def test_a_signal_stops_at_the_next_step_and_no_longer_than_the_run() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with hosts.StopSignal() as stop:
        assert not stop.is_due()
        items = stop.during(range(9))
        assert next(items) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_due()
        with pytest.raises(hosts.Interrupted):
            next(items)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_has_the_rows_of_its_devices() -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    assert local_rows(mesh, 12) == tuple(range(12))
    batch = np.arange(24).reshape(12, 2)
    array = to_global(batch, mesh)
    assert array.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(array, batch)


def test_rows_are_those_of_the_devices_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    # As on a torus, where a host's chips are a square: the first and the third pieces of the batch.
    here = {mesh.devices[0, 0, 0, 0, 0], mesh.devices[0, 2, 0, 0, 1]}
    monkeypatch.setattr("moe.parallel.mesh._is_here", lambda device: device in here)
    assert local_rows(mesh, 8) == (0, 1, 4, 5)
