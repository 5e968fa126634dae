"""Killed at any moment and started again, a run ends as if nothing had happened, to the bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import chaos

EVERY = 20
IMAGES = [
    "--config=configs/digits.py",
    "--config.model.width=32",
    "--config.model.depth=2",
    "--config.model.moe_every=1",
    "--config.moe.expert_width=32",
    "--config.batch_size=64",
    "--config.moe.group_size=8",
    "--config.optimizer.warmup_steps=10",
]
TEXT = [
    "--config=configs/stdlib_lm.py",
    "--config.data.name=files:README.md",
    "--config.data.test_paths=('CHANGELOG.md',)",
    "--config.data.length=64",
    "--config.model.length=64",
    "--config.model.width=32",
    "--config.model.depth=2",
    "--config.model.mlp_width=32",
    "--config.moe.expert_width=32",
    "--config.batch_size=16",
    "--config.optimizer.warmup_steps=10",
]
# Neither goes on while a checkpoint is written, so that what is repeated has a bound that doesn't depend on the disk.
COMMON = ["--config.log_every=1", f"--config.checkpoint.every={EVERY}", "--config.checkpoint.keep=2"]


@pytest.mark.parametrize(
    ("kind", "kills", "steps"),
    [
        ("images", 3, 300),
        pytest.param("images", 20, 2000, marks=pytest.mark.nightly),
        pytest.param("text", 20, 2000, marks=pytest.mark.nightly),
    ],
)
def test_killed_again_and_again_a_run_ends_bit_identical(
    kind: str, kills: int, steps: int, tmp_path: Path, record: Callable[..., None]
) -> None:
    overrides = [*(IMAGES if kind == "images" else TEXT), *COMMON, f"--config.steps={steps}"]
    background = ["--config.checkpoint.background=false"]
    alone, disturbed = tmp_path / "alone", tmp_path / "disturbed"
    assert chaos.start(alone, overrides).wait(timeout=600) == 0
    survival = chaos.disturb(disturbed, [*overrides, *background], kills, seed=kills)

    assert chaos.state_of(disturbed) == chaos.state_of(alone)
    assert (disturbed / "result.json").read_text() == (alone / "result.json").read_text()
    assert chaos.losses(disturbed) == chaos.losses(alone)
    assert sum(survival.kills.values()) == kills
    assert max(survival.repeated) <= EVERY
    assert not list((disturbed / "checkpoints").glob("*tmp*")) + list((disturbed / "checkpoints").glob("*.trash"))
    size = sum(4 * int(np.prod(shape)) for shape, _ in chaos.state_of(alone)["arrays"].values())
    moments = ", ".join(f"{count} {moment}" for moment, count in survival.kills.items())
    record("kills survived", f"{kind}: {moments}", kills, "SIGKILLs")
    record("state compared", kind, size, "bytes")
    record("steps repeated at most", f"{kind}, checkpoint.every = {EVERY}", max(survival.repeated), "steps")
