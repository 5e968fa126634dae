"""Whole conversions: logits against stored ones of transformers, round trips, and what goes wrong."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from moe import cli
from moe.checkpoint import CheckpointError, Checkpoints
from moe.convert import __main__ as program
from moe.convert import from_hf, to_hf
from moe.convert.logits import write_logits
from moe.convert.safetensors import Spec, Tensors, write_shards
from moe.convert.store import Streamed, save_parameters
from moe.models import Variables
from moe.workdir import load_model

STORED = Path(__file__).parent / "stored"
NAMES = ("mixtral", "olmoe", "qwen", "llama", "qwen2", "qwen3")


def load(folder: Path) -> dict[str, np.ndarray]:
    tensors = Tensors(folder)
    return {name: tensors.read(name) for name in tensors.specs}


def write(folder: Path, arrays: dict[str, np.ndarray], source: str = "qwen", shard_bytes: int = 20_000) -> Path:
    """A model's folder with a stored model's config and other tensors."""
    folder.mkdir()
    (folder / "config.json").write_text((STORED / source / "config.json").read_text())
    types = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}
    specs = {name: Spec(types[array.dtype], array.shape) for name, array in arrays.items()}
    write_shards(folder, specs, iter(arrays.values()), shard_bytes)
    return folder


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("workdirs")
    for name in NAMES:
        from_hf(STORED / name, folder / name)
    return {name: folder / name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_that_transformers_made(name: str, workdirs: dict[str, Path], tmp_path: Path) -> None:
    program.main(["logits", str(workdirs[name]), str(STORED / name / "tokens.npy"), str(tmp_path / "logits.npy")])
    got_BLV, wanted_BLV = np.load(tmp_path / "logits.npy"), np.load(STORED / name / "logits.npy")
    assert got_BLV.dtype == np.float32
    assert got_BLV.shape == wanted_BLV.shape
    np.testing.assert_allclose(got_BLV, wanted_BLV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_keeps_every_bit(name: str, workdirs: dict[str, Path], tmp_path: Path) -> None:
    program.main(["to-hf", str(workdirs[name]), str(tmp_path / "back"), "--shard-gb=2e-5"])
    old, new = load(STORED / name), load(tmp_path / "back")
    assert old.keys() == new.keys()
    assert all(old[key].tobytes() == new[key].tobytes() and old[key].dtype == new[key].dtype for key in old)
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 1
    assert max(file.stat().st_size for file in files) < 25_000
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (STORED / name / "config.json").read_text()
    )


def test_types_are_kept_tensor_by_tensor(tmp_path: Path) -> None:
    arrays = load(STORED / "qwen")
    narrow = {
        name: array if "gate.weight" in name else array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()
    }
    folder = write(tmp_path / "hf", narrow)
    (folder / "tokenizer.json").write_text("{}")
    from_hf(folder, tmp_path / "workdir")
    to_hf(tmp_path / "workdir", tmp_path / "back")
    back = load(tmp_path / "back")
    assert all(narrow[key].tobytes() == back[key].tobytes() and narrow[key].dtype == back[key].dtype for key in narrow)
    assert (tmp_path / "back/tokenizer.json").read_text() == "{}"
    loaded = load_model(tmp_path / "workdir")
    assert loaded.config.data.tokenizer.path == str(tmp_path / "workdir/huggingface/tokenizer.json")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.variables))


def test_a_trained_checkpoint_goes_out(workdirs: dict[str, Path], tmp_path: Path) -> None:
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    (workdir / "config.json").write_text((workdirs["olmoe"] / "config.json").read_text())
    variables = load_model(workdirs["olmoe"]).variables
    doubled = jax.tree.map(lambda leaf: 2 * leaf, variables)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    checkpoints.save(3, {"variables": variables}, {})
    checkpoints.save(4, {"variables": doubled}, {})
    checkpoints.close()
    for step, factor in ((3, 1), (None, 2)):
        to_hf(workdir, tmp_path / f"back{factor}", step)
        for name, array in load(STORED / "olmoe").items():
            np.testing.assert_array_equal(load(tmp_path / f"back{factor}")[name], factor * array)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        to_hf(workdir, tmp_path / "back", 7)
    assert not (tmp_path / "back").exists()


def test_parts_are_made_when_they_are_written(tmp_path: Path) -> None:
    count, width = 32, 256

    def parts() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for i in range(count):
            yield (i,), np.full((width, width), i, np.float32)

    params = {name: Streamed((count, width, width), np.dtype(np.float32), 1, parts) for name in "abcd"}
    save_parameters(
        tmp_path / "warm",
        {"x": Streamed((1,), np.dtype(np.float32), 0, lambda: iter([((), np.ones(1, np.float32))]))},
        {},
    )
    tracemalloc.start()
    save_parameters(tmp_path / "checkpoints", params, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * width * width * 4, "32 parts make an array, and there are four"
    abstract = {name: jax.ShapeDtypeStruct((count, width, width), np.float32) for name in "abcd"}
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        abstract,
    )
    restored = Checkpoints(tmp_path / "checkpoints").restore_variables(0, Variables(abstract, {}))
    assert np.array_equal(restored.params["d"][:, 3, 5], np.arange(count))


def missing(arrays: dict[str, np.ndarray]) -> None:
    del arrays["model.layers.1.mlp.experts.3.up_proj.weight"]


def misshapen(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.norm.weight"] = np.ones(7, np.float32)


def surplus(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.layers.1.mlp.shared_expert.up_proj.weight"] = np.ones(7, np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, r"lacks model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight\."),
        (misshapen, r"model\.norm\.weight in .* has shape \(7,\), and config\.json asks for \(24,\)"),
        (surplus, r"holds model\.layers\.1\.mlp\.shared_expert\.up_proj\.weight, which config\.json doesn't ask for"),
    ],
)
def test_tensors_that_do_not_fit(change, words: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    arrays = load(STORED / "qwen")
    change(arrays)
    write(tmp_path / "hf", arrays)
    with pytest.raises(ValueError, match=words):
        from_hf(tmp_path / "hf", tmp_path / "workdir")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_shards_that_are_not_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", load(STORED / "qwen"))
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(cli.UsageError, match="truncated or damaged, download it again"):
        program.main(["from-hf", str(folder), str(tmp_path / "workdir")])
    last.unlink()
    with pytest.raises(cli.UsageError, match=f"lacks {last.name}: download it again"):
        program.main(["from-hf", str(folder), str(tmp_path / "workdir")])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_failure_in_the_middle_leaves_nothing(
    workdirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Tensors, name: str) -> np.ndarray:
        if "layers.1" in name:
            raise OSError(28, "No space left on device")
        return read(self, name)

    read = Tensors.read
    monkeypatch.setattr(Tensors, "read", fail)
    with pytest.raises(OSError, match="No space"):
        from_hf(STORED / "qwen", tmp_path / "workdir")
    monkeypatch.setattr("moe.convert.convert.write_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        to_hf(workdirs["qwen"], tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(workdirs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists: choose another name, or remove it"):
        from_hf(STORED / "qwen", tmp_path)
    with pytest.raises(ValueError, match="exists"):
        to_hf(workdirs["qwen"], tmp_path)
    with pytest.raises(ValueError, match="exists"):
        write_logits(workdirs["qwen"], STORED / "qwen/tokens.npy", STORED / "qwen/logits.npy")
    with pytest.raises(ValueError, match="there is no folder"):
        from_hf(tmp_path / "nowhere", tmp_path / "workdir")
    with pytest.raises(ValueError, match=r"there is no .*config\.json"):
        from_hf(tmp_path, tmp_path / "workdir")
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        to_hf(tmp_path, tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.zeros((2, 3)), "float64 of shape"),
        (np.zeros(3, np.int32), "must be integers"),
        (np.zeros((0, 3), np.int32), "must be integers"),
        (np.array([[0, 37]]), r"ids from 0 to 37: model\.vocab_size is 37"),
        (np.array([[-1, 3]]), "ids from -1 to 3"),
        (np.zeros((1, 49), np.int32), r"49 tokens exceed model\.length = 48"),
        (None, "not a .npy file"),
    ],
)
def test_tokens_that_do_not_fit(
    tokens: np.ndarray | None, words: str, workdirs: dict[str, Path], tmp_path: Path
) -> None:
    if tokens is None:
        (tmp_path / "tokens.npy").write_bytes(b"no array")
    else:
        np.save(tmp_path / "tokens.npy", tokens)
    with pytest.raises(ValueError, match=words):
        write_logits(workdirs["mixtral"], tmp_path / "tokens.npy", tmp_path / "logits.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["from-hf", "a"], "takes 2 paths, not 1"),
        (["logits", "a", "b"], "takes 3 paths, not 2"),
        (["to-hf", "a", "b", "--config.seed=1"], "takes no config field: seed=1"),
        (["to-hf", "a", "b", "--shard-gb=0"], r"--shard-gb = 0\.0 must be positive"),
        (["convert", "a"], "invalid choice"),
    ],
)
def test_command_lines(argv: list[str], words: str) -> None:
    with pytest.raises(cli.UsageError, match=words):
        program.main(argv)
