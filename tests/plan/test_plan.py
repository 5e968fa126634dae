"""plan.py as a user calls it: mistakes in one sentence, and small models' plans against counts by hand."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import plan
import train
from moe import cli
from moe.config import Config
from moe.data.text import TextConfig
from moe.layers.moe import MoeConfig
from moe.models import LmConfig
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.plan.activations import kept_bytes
from moe.plan.chips import GIB, parse_slice
from moe.routers import Softmax

D, F, E, K, V, LENGTH, BATCH, DEPTH = 256, 512, 8, 2, 512, 256, 16, 2
CONFIG = Config(
    seed=0,
    steps=2000,
    batch_size=BATCH,
    model=LmConfig(
        vocab_size=V, length=LENGTH, width=D, depth=DEPTH, heads=4, mlp_width=F, moe_every=1, dtype="bfloat16"
    ),
    moe=MoeConfig(num_experts=E, expert_width=F, group_size=1, dispatch="dropless"),
    router=Softmax(k=K),
    data=TextConfig(length=LENGTH),
    mesh=MeshConfig(data=2, expert=2),
)  # fmt: skip


def told(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.run(plan.main, argv)
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology=v9:2x2"], "topology 'v9:2x2' is of no kind of TPU known here: v4:2x2x1"),
        (["--topology=v5e:2x2", "--config.mesh.expert=3"], "doesn't fill the 4 devices here"),
        (["--topology=v5e:2x2", "--config=configs/no.py"], "there is no config file configs/no.py"),
        (["--topology=v5e:2x2", "--config.model.widht=3"], "widht"),
        ([], "--topology"),
    ],
)
def test_a_mistake_is_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = told(argv, capsys)
    assert code == cli.USAGE
    assert message in error
    assert error.count("\n") == 1


def test_copies_fill_a_larger_slice() -> None:
    mesh, slice_ = MeshConfig(data=1, fsdp=8, expert=8), parse_slice("v5p:4x4x8")
    assert plan.fill(mesh, slice_, []) == MeshConfig(data=-1, fsdp=8, expert=8)
    assert plan.fill(mesh, slice_, ["mesh.expert=8"]) == MeshConfig(data=-1, fsdp=8, expert=8)
    assert plan.fill(mesh, parse_slice("v5p:4x4x4"), []) == mesh
    for wrong, overrides in ((mesh, ["mesh.data=1"]), (MeshConfig(data=1, fsdp=24), [])):
        with pytest.raises(ValueError, match="doesn't fill the 128 devices"):
            plan.fill(wrong, slice_, overrides)


def test_without_libtpu_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = importlib.metadata.version

    def missing(name: str) -> str:
        if name == "libtpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    code, error = told(["--topology=v5e:2x2"], capsys)
    assert code == cli.FAILURE
    assert error.endswith("pip install 'moe-jax[tpu-aot]'.\n")


# The real compiler ----------------------------------------------------------------------------------------------------


def facts_of(topology: str = "v5e:2x2", **changes: Any) -> dict[str, Any]:
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'moe-jax[tpu-aot]'")
    return plan.plan(dataclasses.replace(CONFIG, **changes), parse_slice(topology))


@pytest.mark.tpu_aot
def test_a_dense_model_is_planned_as_counted_by_hand() -> None:
    dense = dataclasses.replace(CONFIG.model, moe_every=0)
    facts = facts_of(model=dense, mesh=MeshConfig(data=4))
    matrices = DEPTH * (4 * D * D + 3 * D * F) + D * V
    parameters = matrices + V * D + (2 * DEPTH + 1) * D
    assert facts["parameters/all"] == parameters
    assert facts["hbm/parameters_bytes"] == 4 * parameters
    assert facts["hbm/optimizer_bytes"] == pytest.approx(8 * parameters, abs=64)
    # The kernel for attention multiplies twice forward, and three and four times in its two passes backward, with all
    # of a tile's keys; the model's own FLOPs are of six products with the keys that a token sees.
    product = DEPTH * 2 * D * LENGTH
    tokens = BATCH * LENGTH / 4
    assert facts["flops/compiled"] == pytest.approx(tokens * (3 * 2 * matrices + 9 * product), rel=0.02)
    needed = 6 * product * (LENGTH + 1) / 2 / LENGTH
    assert facts["flops/active"] == pytest.approx(tokens * (3 * 2 * matrices + needed), rel=1e-6)
    # A ring sums up every gradient once: those of the blocks' matrices in bfloat16, of head and embedding in float32.
    sums = sum(one["bytes"] for one in facts["collectives"] if one["kind"] in ("all-reduce", "reduce-scatter"))
    gradients = 2 * (matrices - D * V) + 4 * 2 * D * V
    assert sums == pytest.approx(2 * 3 / 4 * gradients, rel=0.02)
    assert {tuple(one["axes"]) for one in facts["collectives"]} == {("data",)}
    assert facts["fits"]
    assert facts["faults"] == []


def kept(**model: Any) -> int:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **model))
    mesh = make_mesh(MeshConfig(data=4, expert=2))
    step = train.make_step(config, mesh)
    return kept_bytes(config, step.abstract_state.variables, step.abstract_batch, mesh)


def test_activations_are_what_is_counted_by_hand() -> None:
    """Another block keeps its input, in bfloat16; all that blocks share is the same."""
    row = BATCH * LENGTH // 8 * D
    assert kept(remat="full", depth=4) - kept(remat="full", depth=2) == 2 * row * 2
    # Around them: the last norm has its input in float32 three times, and there is some of the vocabulary's loss.
    around = kept(remat="full") - DEPTH * row * 2
    assert 3 * row * 4 < around < 2 * 3 * row * 4
    # Without it each of a token's choices has rows of its own, of which there are K, twice as wide as the input.
    assert kept(remat="none") - around > DEPTH * row * 2 * (1 + 3 * K * F / D)


@pytest.mark.tpu_aot
def test_a_dense_fallback_is_named() -> None:
    facts = facts_of(moe=dataclasses.replace(CONFIG.moe, num_experts=32, dispatch="einsum", capacity_factor=16.0))
    assert facts["flops/ratio"] > 3
    assert any("moe.dispatch = 'einsum'" in fault for fault in facts["faults"])


@pytest.mark.tpu_aot
def test_activations_that_are_kept_are_named() -> None:
    facts = facts_of(model=dataclasses.replace(CONFIG.model, remat="none"), batch_size=256 * BATCH)
    assert facts["hbm/activations_bytes"] > 0.5 * facts["hbm/limit_bytes"]
    assert any("model.remat = 'none' keeps" in fault for fault in facts["faults"])


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("topology", "kind"), [("v5e:4x4", "ragged-all-to-all"), ("v5e:4x8", "all-to-all")])
def test_rows_travel_on_every_slice(topology: str, kind: str) -> None:
    """Beyond 16 chips of v5e the compiler has no ragged all-to-all."""
    devices = parse_slice(topology).devices
    facts = facts_of(topology, batch_size=devices, mesh=MeshConfig(data=devices // 8, expert=8))
    largest = max((one for one in facts["collectives"] if one["axes"] == ("expert",)), key=lambda one: one["bytes"])
    assert largest["kind"] == kind


@pytest.mark.tpu_aot
def test_between_slices_only_gradients_travel() -> None:
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'moe-jax[tpu-aot]'")
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(dcn=2, fsdp=2, expert=2))
    facts = plan.plan(config, parse_slice("v5e:2x2", count=2))
    across = [one for one in facts["collectives"] if "dcn" in one["axes"]]
    held = facts["hbm/parameters_bytes"]
    assert {one["kind"] for one in across} <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert 0.5 * held < sum(one["bytes"] for one in across) < 2.1 * held
    # The data centre's network is slower than a link between chips, and its bound is its own.
    assert any("dcn" in name for name in facts["bound/interconnect"])


@pytest.mark.tpu_aot
def test_a_slice_of_512_devices_is_planned() -> None:
    facts = facts_of("v5p:8x8x8", batch_size=512, mesh=MeshConfig(data=64, fsdp=2, expert=4))
    assert facts["fits"]
    assert facts["devices"] == 512
    # The same work on each as on a slice of eight.
    small = facts_of("v5p:2x2x2", batch_size=8, mesh=MeshConfig(data=1, fsdp=2, expert=4))
    assert facts["flops/compiled"] == pytest.approx(small["flops/compiled"], rel=0.02)


@pytest.mark.tpu_aot
def test_what_does_not_fit_is_named_with_the_excess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'moe-jax[tpu-aot]'")
    # Eight copies of the state of 2 B parameters.
    large = ["--config.model.width=2048", "--config.moe.expert_width=8192", "--config.mesh.data=4", "--quick"]
    argv = ["--config=configs/stdlib_lm.py", "--topology=v5e:2x2", f"--json={tmp_path / 'plan.json'}", *large]
    code, error = told(argv, capsys)
    assert (code, error) == (cli.FAILURE, "")
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert not facts["fits"]
    assert facts["hbm/peak_bytes"] > facts["hbm/limit_bytes"] == 15.75 * GIB
    assert any("there are 4 copies of them" in fault for fault in facts["faults"])
