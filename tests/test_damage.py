"""A newest checkpoint that is damaged in any way is restored to the bit or set aside for the one before."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.checkpoint import Checkpoints
from moe.types import PyTree

POSITION = {"examples": 72}


def make_state(step: int) -> PyTree:
    """Arrays of several types, some of which compress well and some of which don't."""
    key = jax.random.key(step)
    return {
        "step": jnp.int32(step),
        "variables": {
            "params": {"w": jax.random.normal(key, (16, 12)), "scale": jnp.ones(40), "half": jnp.ones(6, jnp.bfloat16)},
            "router_state": {"bias": jnp.arange(8.0)},
        },
        "key": jax.random.key_data(key),
    }


STATES = {step: make_state(step) for step in (3, 6)}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATES[3])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step, state in STATES.items():
        checkpoints.save(step, state, POSITION)
        checkpoints.wait()
    checkpoints.close()
    return folder


def restore(folder: Path) -> tuple[PyTree, dict[str, Any]]:
    checkpoints = Checkpoints(folder, keep=3)
    try:
        restored = checkpoints.restore_newest(ABSTRACT)
        assert restored is not None
        return restored
    finally:
        checkpoints.close()


def is_same(one: PyTree, other: PyTree) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def blank(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    size = draw.randint(1, 64)
    data[start : start + size] = draw.choice((b"\0", b"\xff")) * len(data[start : start + size])
    path.write_bytes(bytes(data))


def garble(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    data[start : start + 16] = draw.randbytes(len(data[start : start + 16]))
    path.write_bytes(bytes(data))


def truncate(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 64)))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def remove_folder(path: Path, draw: random.Random) -> None:
    shutil.rmtree(path.parent)


def exchange(path: Path, draw: random.Random) -> None:
    """With a file of the checkpoint before."""
    files = [file for file in (path.parents[len(path.parts) - path.parts.index("checkpoints") - 2] / "3").rglob("*")
             if file.is_file()]  # fmt: skip
    path.write_bytes(draw.choice(files).read_bytes())


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    flip,
    flip,
    flip,
    blank,
    garble,
    truncate,
    lengthen,
    remove,
    remove_folder,
    exchange,
]


def survive(whole: Path, folder: Path, seed: int) -> str:
    """Does one harm to the newest checkpoint; returns whether it could be read all the same."""
    draw = random.Random(seed)
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(whole, folder)
    files = sorted(path for path in (folder / "6").rglob("*") if path.is_file() and path.stat().st_size)
    path = draw.choice(files)
    harm = draw.choice(DAMAGES)
    harm(path, draw)
    was_there = (folder / "6").is_dir()
    case = f"seed {seed}: {harm.__name__} of {path.relative_to(folder)}"
    state, position = restore(folder)
    step = int(state["step"])
    assert position == POSITION, case
    assert step in STATES, case
    assert is_same(state, STATES[step]), case
    assert (folder / "6").is_dir() == (step == 6), case
    assert (folder / "6.damaged").is_dir() == (step == 3 and was_there), case
    return "read" if step == 6 else "set aside"


# What TensorStore was still reading when another array failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    "seeds", [range(200), pytest.param(range(200, 10_200), marks=pytest.mark.nightly)], ids=["200", "10000"]
)
def test_no_damage_is_fatal_or_goes_unseen(
    seeds: range, whole: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    outcomes = [survive(whole, tmp_path / "copy" / "checkpoints", seed) for seed in seeds]
    assert outcomes.count("set aside") > len(seeds) / 4
    record("corruptions survived", f"{outcomes.count('set aside')} set aside, the others read", len(outcomes), "cases")
