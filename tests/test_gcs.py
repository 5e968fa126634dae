"""Workdirs on a bucket, against a server of Google Cloud Storage in this process."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from moe import config as config_lib
from moe.checkpoint import CheckpointError, Checkpoints, complete_steps
from moe.files import open_path
from moe.workdir import open_workdir
from tests import compiling
from tests.gcs_server import GcsServer
from tests.test_programs import SMALL

REPOSITORY = Path(__file__).parents[1]
# aiohttp on bodies above a megabyte, which gcsfs sends as bytes. Only Python's own filter hides it outside of tests.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly with raw bytes:ResourceWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[GcsServer]:
    """One for this module: TensorStore reads its address once in a process."""
    with pytest.MonkeyPatch.context() as patch, GcsServer("bucket", "locked") as server:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        # fsspec has read its environment when it was imported.
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield server
        files = fsspec.filesystem("gcs", finalize_on_close=True)
        if files.session is not None:
            asyncio.run_coroutine_threadsafe(files.session.close(), files.loop).result()


@pytest.fixture
def folder(server: GcsServer, request: pytest.FixtureRequest) -> epath.Path:
    """A folder of the test's own."""
    path = open_path(f"gs://bucket/{request.node.name}")
    assert isinstance(path, epath.Path)
    return path


def test_files(server: GcsServer, folder: epath.Path) -> None:
    (folder / "a.txt").write_text("one\ntwo\n")
    assert (folder / "a.txt").read_text() == "one\ntwo\n"
    (folder / "a.txt").write_text("three\n")
    assert (folder / "a.txt").read_text() == "three\n"
    assert folder.is_dir()
    assert not (folder / "a.txt").is_dir()
    assert not (folder / "b.txt").exists()
    with pytest.raises(FileNotFoundError):
        (folder / "b.txt").read_text()
    (folder / "a.txt").rename(folder / "b.txt")
    assert (folder / "b.txt").read_text() == "three\n"
    assert server.names("bucket", folder.name) == [f"{folder.name}/b.txt"]
    (folder / "b.txt").unlink()
    assert not folder.exists()


def test_folders(server: GcsServer, folder: epath.Path) -> None:
    """They are prefixes of names, and are there while there is something in them."""
    folder.mkdir(parents=True, exist_ok=True)
    assert not folder.exists()
    server.page = 3
    for index in range(7):
        (folder / "steps" / f"{index}").write_text(str(index))
    (folder / "steps" / "other").write_text("")
    assert [path.name for path in folder.iterdir()] == ["steps"]
    assert sorted(path.name for path in (folder / "steps").glob("[0-9]*")) == [f"{index}" for index in range(7)]
    (folder / "steps").rename(folder / "moved")
    assert len(server.names("bucket", f"{folder.name}/moved/")) == 8
    folder.rmtree()
    assert server.names("bucket", f"{folder.name}/") == []
    server.page = 1000


def test_a_large_file_goes_in_pieces(server: GcsServer, folder: epath.Path) -> None:
    before = server.count("POST .*upload_id=")
    content = bytes(range(256)) * 2**15
    (folder / "large").write_bytes(content)
    assert (folder / "large").read_bytes() == content
    assert server.count("POST .*upload_id=") - before == 2


def test_a_server_that_is_busy_for_a_moment_is_asked_again(server: GcsServer, folder: epath.Path) -> None:
    with server.failing(f"POST .*{folder.name}/a.txt") as fault:
        (folder / "a.txt").write_text("one")
    assert fault.left == 0
    with server.failing(f"GET /download.*{folder.name}/a.txt") as fault:
        assert (folder / "a.txt").read_text() == "one"
    assert fault.left == 0


@pytest.mark.parametrize("bucket", ["locked", "missing"])
def test_a_bucket_that_cannot_be_written_or_is_not_there(bucket: str, server: GcsServer) -> None:
    workdir = open_path(f"gs://{bucket}/runs/digits")
    config = config_lib.load_file(str(REPOSITORY / "configs/digits.py"))
    with server.failing("b/locked", 403, count=10**9), pytest.raises(OSError, match=f"workdir {workdir} can't be wr"):
        open_workdir(workdir, config)


def test_without_gcsfs_one_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"'gs://bucket/a' needs gcsfs, .*pip install 'moe-jax\[gcs\]'"):
        open_path("gs://bucket/a")
    assert open_path("a") == Path("a")


def laid(axes: dict[str, int], *spec: str | None) -> NamedSharding:
    count = int(np.prod(list(axes.values())))
    devices = np.array(jax.devices()[:count]).reshape(*axes.values())
    return NamedSharding(jax.sharding.Mesh(devices, tuple(axes)), PartitionSpec(*spec))


def state(scale: float, sharding: NamedSharding) -> dict[str, Any]:
    w = jnp.arange(64.0 * 32).reshape(64, 32) * scale
    return {"variables": {"w": jax.device_put(w, sharding)}, "step": jnp.asarray(3)}


def abstract(sharding: NamedSharding) -> dict[str, Any]:
    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(sharding.mesh, PartitionSpec()))
    return {"variables": {"w": w}, "step": step}


def test_checkpoints_move_to_another_mesh(server: GcsServer, folder: epath.Path) -> None:
    """On a bucket that is busy for a moment, which TensorStore bears."""
    wide, flat = laid({"data": 2, "expert": 4}, "data", "expert"), laid({"expert": 4}, None, "expert")
    assert complete_steps(folder) == []
    checkpoints = Checkpoints(folder, keep=2)
    with server.failing(f"POST .*uploadType=media.*{folder.name}/1/state/") as fault:
        checkpoints.save(1, state(1, wide), {"position": 1})
        checkpoints.wait()
    assert fault.left == 0
    for step in (2, 3):
        checkpoints.save(step, state(step, wide), {"position": step})
    checkpoints.close()
    assert complete_steps(folder) == [2, 3]
    assert server.names("bucket", f"{folder.name}/1/") == []

    checkpoints = Checkpoints(folder)
    with server.failing(f"GET /storage.*{folder.name}/3/state/.*alt=media") as fault:
        restored, position = checkpoints.restore(checkpoints.choose(None), abstract(flat))
    assert fault.left == 0
    assert position == {"position": 3}
    w = restored["variables"]["w"]
    assert w.sharding.is_equivalent_to(flat, 2)
    np.testing.assert_array_equal(w, state(3, flat)["variables"]["w"])
    part = checkpoints.restore_variables(2, abstract(wide)["variables"])
    np.testing.assert_array_equal(part["w"], state(2, wide)["variables"]["w"])
    checkpoints.close()


def test_a_damaged_checkpoint_is_set_aside_on_a_bucket_too(
    server: GcsServer, folder: epath.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sharding = laid({"expert": 8}, "expert")
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        checkpoints.save(step, state(step, sharding), {"examples": step})
    checkpoints.wait()
    for name in server.names("bucket", f"{folder.name}/2/state/"):
        if "/d/" in name:
            data, _ = server.get("bucket", name)
            server.put("bucket", name, data[: len(data) // 2], {})
    restored = checkpoints.restore_newest(abstract(sharding))
    assert restored is not None
    assert restored[1] == {"examples": 1}
    np.testing.assert_array_equal(restored[0]["variables"]["w"], state(1, sharding)["variables"]["w"])
    assert f"it is set aside in {folder}/2.damaged" in capsys.readouterr().err
    assert checkpoints.steps() == complete_steps(folder) == [1]
    assert server.names("bucket", f"{folder.name}/2.damaged/state/") != []
    assert server.names("bucket", f"{folder.name}/2/") == []
    checkpoints.close()


def test_a_save_that_is_cut_off_is_not_seen(server: GcsServer, folder: epath.Path) -> None:
    """By a refusal to write the arrays, or by the end of the process before the last file says that it's whole."""
    sharding = laid({"expert": 8}, "expert")
    checkpoints = Checkpoints(folder, keep=3)
    checkpoints.save(1, state(1, sharding), {})
    checkpoints.wait()
    with server.failing(f"POST .*{folder.name}/2/state/manifest.ocdbt", 403, count=10**9):
        checkpoints.save(2, state(2, sharding), {})
        with pytest.raises(CheckpointError, match="the test wants 403 here"):
            checkpoints.wait()
    checkpoints = Checkpoints(folder, keep=3)
    checkpoints.save(3, state(3, sharding), {})
    checkpoints.close()
    assert complete_steps(folder) == [1, 3]
    del server.buckets["bucket"][f"{folder.name}/3/commit_success.txt"]
    assert server.names("bucket", f"{folder.name}/3/state/") != []
    assert complete_steps(folder) == [1]
    with contextlib.closing(Checkpoints(folder)) as reader, pytest.raises(CheckpointError, match="there are 1"):
        reader.choose(3)

    checkpoints = Checkpoints(folder, keep=3)
    assert checkpoints.steps() == [1]
    checkpoints.save(3, state(3, sharding), {})
    checkpoints.close()
    assert complete_steps(folder) == [1, 3]


def run_on(server: GcsServer, data: Path, program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, whose bucket is on the server."""
    environment = {
        **os.environ,
        **server.environment(),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(compiling.FLAGS),
        "TFDS_DATA_DIR": str(data),
    }
    command = [sys.executable, program, *args]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def train_on(server: GcsServer, data: Path, *args: str) -> str:
    """What train.py prints; it has to succeed."""
    done = run_on(server, data, "train.py", *SMALL, "--workdir=gs://bucket/runs/digits", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def read(server: GcsServer, name: str) -> str:
    return server.buckets["bucket"][f"runs/digits/{name}"][0].decode()


def test_a_run_on_a_bucket_goes_on_there_and_is_evaluated(server: GcsServer, tmp_path: Path) -> None:
    assert "resuming" not in train_on(server, tmp_path, "--config.steps=4")
    assert "resuming from step 4" in train_on(server, tmp_path, "--config.steps=8")
    result = json.loads(read(server, "result.json"))
    assert result["step"] == 8
    assert json.loads(read(server, "config.json"))["steps"] == 8
    lines = [json.loads(line) for line in read(server, "metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8]
    names = server.names("bucket", "runs/digits/")
    assert len([name for name in names if "/tensorboard/events.out.tfevents." in name]) == 2
    checkpoints = {name.split("/")[3] for name in names if name.startswith("runs/digits/checkpoints/")}
    assert checkpoints == {"4", "6", "8"}
    others = {name.split("/")[2] for name in names} - {"checkpoints", "tensorboard"}
    written = {"config.json", "environment.json", "load.jsonl", "metrics.jsonl", "report.html", "result.json"}
    assert others == written
    loads = [json.loads(line) for line in read(server, "load.jsonl").splitlines()]
    assert [line["step"] for line in loads] == [2, 4, 6, 8]

    done = run_on(server, tmp_path, "evaluate.py", "--workdir=gs://bucket/runs/digits")
    assert done.returncode == 0, done.stderr
    assert json.loads(read(server, "evaluation.json")) == pytest.approx(result)
