"""What runs begin with: a dense model's function in the experts, other runs' weights, and what fits nothing."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from moe import config as config_lib
from moe import initial
from moe.checkpoint import CheckpointError, Checkpoints, _sealed
from moe.convert.convert import make_table, open_hf
from moe.convert.source import Source, SourceArray, name_variables, open_source
from moe.models import Variables, make_model
from moe.ops.upcycle import UpcycleConfig
from moe.parallel.mesh import MeshConfig, make_mesh, param_shardings
from tests.convert import reference
from tests.test_step import compile_fast

__all__ = ["compile_fast"]

CONFIGS = Path(__file__).parents[1] / "configs"
ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])
COMMON = [
    "model.depth=4",
    "model.width=16",
    "model.heads=2",
    "model.mlp_width=24",
    "moe.expert_width=24",
    "moe.num_experts=4",
    "moe.group_size=1",
    "model.scan_layers=true",
    "router.softmax.renormalize=true",
]
SMALL = {
    "digits": [*COMMON, "model.patch_size=4", "model.moe_every=2"],
    "stdlib_lm": [*COMMON, "model.vocab_size=23", "model.length=12", "model.kv_heads=1", "model.moe_every=2"],
}
DENSE = "model.moe_every=0"


def make_config(name: str, *overrides: str) -> ml_collections.ConfigDict:
    table = config_lib.load_file(str(CONFIGS / f"{name}.py"))
    config_lib.override(table, [*SMALL[name], *overrides])
    return table


def draw(abstract: Variables, seed: int) -> Variables:
    """Random variables, none of which is where models start it."""
    rng = np.random.default_rng(seed)

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        shift = 1.0 if "scale" in str(path[-1]) else 0.0
        return rng.normal(shift, 0.3, leaf.shape).astype(leaf.dtype)

    return Variables(*(jax.tree_util.tree_map_with_path(one, tree) for tree in abstract))


def save(workdir: Path, table: ml_collections.ConfigDict, step: int = 7) -> None:
    """A run's folder with a checkpoint."""
    config = config_lib.resolve(table)
    model = make_model(config.model, config.moe, config.router)
    variables = jax.device_put(draw(jax.eval_shape(model.init, jax.random.key(0)), step), jax.devices()[0])
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(config_lib.to_json(table))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=3)
    checkpoints.save(step, {"variables": variables}, {})
    checkpoints.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense models and models with experts in every second block, of images and of text."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SMALL:
        save(folder / f"{name}-dense", make_config(name, DENSE))
        save(folder / f"{name}-moe", make_config(name))
    return folder


def begin(table: ml_collections.ConfigDict, path: Path, mesh: Any = ONE_DEVICE) -> tuple[initial.Initial, Variables]:
    """Plan and variables of a run that begins with `path`."""
    config_lib.override(table, [f"init_from={path}"])
    config = config_lib.resolve(table)
    model = make_model(config.model, config.moe, config.router)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    shardings = Variables(*(param_shardings(*pair, mesh) for pair in zip(abstract, model.axes, strict=True)))
    plan = initial.plan_initial(config, abstract)
    return plan, initial.load_initial(plan, jax.device_put(draw(abstract, 1), shardings))


def logits_of(table: ml_collections.ConfigDict, variables: Variables, tokens_BL: Any = None) -> np.ndarray:
    """What the model says of a few inputs in evaluation."""
    config = config_lib.resolve(table)
    model = make_model(config.model, config.moe, config.router)
    rng = np.random.default_rng(0)
    if tokens_BL is not None:
        inputs = tokens_BL
    elif table.model.name == "vit":
        inputs = rng.normal(size=(4, 8, 8, 1)).astype(np.float32)
    else:
        inputs = rng.integers(0, 23, (4, 12)).astype(np.int32)
    return np.asarray(jax.jit(functools.partial(model.apply, keys=None, mesh=ONE_DEVICE))(variables, inputs).logits)


@functools.cache
def source_logits(path: Path) -> np.ndarray:
    """The logits of a saved model by its own config."""
    table = config_lib.load_file(str(path / "config.json"))
    config = config_lib.resolve(table)
    abstract = jax.eval_shape(make_model(config.model, config.moe, config.router).init, jax.random.key(0))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)
    checkpoints = Checkpoints(path / "checkpoints")
    return logits_of(table, checkpoints.restore_variables(checkpoints.choose(None), abstract))


def report(plan: initial.Initial) -> str:
    return "\n".join(initial.describe(plan))


SPLIT = ["upcycle.method=split", "moe.expert_width=6", "moe.num_experts=8", "router.k=4"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        SPLIT,
        [*SPLIT, "router.k=8", "model.moe_every=1"],
        # Weights that add up to 2.
        ["router.name=sigmoid", "router.sigmoid.routed_scaling=2", "upcycle.output_scale=.5", "model.dense_layers=2"],
    ],
    ids=["copy", "split", "split, two groups", "copy, scaled"],
)
def test_experts_compute_the_dense_function(name: str, overrides: list[str], folder: Path) -> None:
    table = make_config(name, *[one for one in overrides if name == "digits" or not one.startswith("router.sigmoid")])
    if name == "stdlib_lm" and "router.name=sigmoid" in overrides:
        with table.unlocked():
            table.router.sigmoid = {"routed_scaling": 2.0}
    plan, variables = begin(table, folder / f"{name}-dense")
    wanted = source_logits(folder / f"{name}-dense")
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(logits_of(table, variables), wanted, atol=1e-5, rtol=0)
    assert "combine weights add up" not in report(plan)
    if "upcycle.output_scale=.5" in overrides:
        plan = plan._replace(config=dataclasses.replace(plan.config, upcycle=UpcycleConfig()))
        assert "is 2.00 of the MLP's; upcycle.output_scale = 0.50 would" in report(plan)


def test_raw_weights_lose_output_and_the_report_says_how_much(folder: Path) -> None:
    table = make_config("digits", "router.softmax.renormalize=false")
    plan, _ = begin(table, folder / "digits-dense")
    total = float(re.search(r"add up to about ([\d.]+), so that the experts' output is \1 of", report(plan)).group(1))  # type: ignore[union-attr]
    logits = np.random.default_rng(0).normal(size=(10_000, 4))
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert total == pytest.approx(np.sort(probs)[:, 2:].sum(axis=1).mean(), abs=0.03)


def test_every_mesh_gets_the_same_experts_and_reads_no_more_than_a_shard(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def open_recorded(path: Path) -> Source:
        def recorded(array: SourceArray) -> SourceArray:
            def read(indices: Any) -> np.ndarray:
                block = array.read(indices)
                sizes.append(block.size)
                return block

            return SourceArray(array.shape, read)

        source = open_source(path)
        return source._replace(arrays={name: recorded(array) for name, array in source.arrays.items()})

    monkeypatch.setattr(initial, "open_source", open_recorded)
    even = ["model.kv_heads=2", "model.vocab_size=24"]
    save(folder / "even", make_config("stdlib_lm", DENSE, *even))
    table = make_config("stdlib_lm", "upcycle.noise=.1", "upcycle.drop=.5", *even, *SPLIT)
    plan, wanted = begin(table, folder / "even")
    reads = len(sizes)
    sizes.clear()
    _, got = begin(table, folder / "even", make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2)))
    model = make_model(plan.config.model, plan.config.moe, plan.config.router)
    abstract = jax.eval_shape(model.init, jax.random.key(0)).params
    mesh = jax.tree.leaves(got)[0].sharding.mesh
    shardings = param_shardings(abstract, model.axes.params, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, got.params) == shardings
    # A quarter of what projects to queries, keys and values in two blocks.
    assert max(sizes) == 2 * 16 * 2 * 24 // 4
    assert len(sizes) <= 4 * reads, "what lies on two devices is read once"
    # Deviations are summed in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *jax.device_get((got, wanted)))


def test_what_is_drawn_belongs_to_the_seed_and_the_block(folder: Path) -> None:
    def experts(every: int, seed: int) -> np.ndarray:
        table = make_config("digits", "upcycle.noise=.1", f"model.moe_every={every}", f"seed={seed}")
        _, variables = begin(table, folder / "digits-dense")
        return np.asarray(variables.params["blocks"]["periods"]["blocks"][every - 1]["f"]["experts"]["w_in"])

    assert not np.array_equal(experts(2, 0), experts(2, 1))
    # Deviations are summed in another order.
    np.testing.assert_allclose(experts(2, 0), experts(1, 0)[[1, 3]], atol=1e-6)


def test_the_report_names_every_parameter(folder: Path) -> None:
    plan, variables = begin(make_config("digits"), folder / "digits-dense")
    lines = report(plan).splitlines()
    assert lines == [
        f"begins with {folder / 'digits-dense' / 'checkpoints' / '7'}",
        "  kept: 34 arrays: attention.w_in, attention.w_out, attention_norm.bias, attention_norm.scale, f_norm.bias, "
        "f_norm.scale of blocks 0 to 3; f.weights.w_in, f.weights.w_out of blocks 0, 2; head.bias, head.kernel, "
        "norm.bias, norm.scale, position, w_patch",
        "  upcycled: 4 arrays: f.experts.w_in, f.experts.w_out of blocks 1, 3",
        "  fresh: 2 arrays: f.w_gate of blocks 1, 3",
        "  dropped: 0 arrays",
    ]
    # Six arrays around the blocks, six around the MLP in each of four, two MLPs of two matrices.
    assert len(name_variables(variables)) == 6 + 2 * 6 + 2 + 3


def test_another_router_keeps_the_gate_if_it_is_as_wide(folder: Path) -> None:
    source = folder / "digits-moe"
    table = make_config("digits", "router.name=sparse_topk")
    plan, variables = begin(table, source)
    assert "  kept: 40 arrays: " in report(plan)
    assert "\n  upcycled: 0 arrays\n  fresh: 0 arrays\n  dropped: 0 arrays" in report(plan)
    config_lib.override(table, ["router.name=softmax"])
    np.testing.assert_array_equal(logits_of(table, variables), source_logits(source))
    plan, _ = begin(make_config("digits", "router.name=soft"), source)
    assert "fresh: 2 arrays: f.w_gate of blocks 1, 3\n  dropped: 2 arrays: f.w_gate of blocks 1, 3" in report(plan)
    plan, _ = begin(make_config("digits", "router.name=sigmoid"), source)
    assert "kept: 40 arrays" in report(plan)
    assert "fresh: 4 arrays: f.router_state.bias, f.router_state.load of blocks 1, 3" in report(plan)


def test_another_number_of_experts(folder: Path) -> None:
    source = folder / "digits-moe"
    # Every choice is made twice, with half the weight.
    table = make_config("digits", "moe.num_experts=8", "router.k=4")
    plan, variables = begin(table, source)
    np.testing.assert_allclose(logits_of(table, variables), source_logits(source), atol=1e-5, rtol=0)
    assert "upcycled: 4 arrays: f.experts.w_in, f.experts.w_out of blocks 1, 3" in report(plan)
    assert "4 experts there and 8 here: number e is that of number e mod 4" in report(plan)
    plan, variables = begin(make_config("digits", "moe.num_experts=3"), source)
    assert "4 experts there and 3 here: number e is that of number e mod 4, and the last 1 are dropped" in report(plan)
    saved = open_source(source).arrays
    for path, leaf in name_variables(variables).items():
        if "experts" in path or "w_gate" in path:
            axis = 1 if "experts" in path else 2
            whole = saved[path].read([np.arange(size) for size in saved[path].shape])
            np.testing.assert_array_equal(leaf, np.take(whole, range(3), axis))


def test_dense_blocks_among_experts_become_experts(folder: Path) -> None:
    source = folder / "stdlib_lm-moe"
    table = make_config("stdlib_lm", "model.moe_every=1")
    plan, variables = begin(table, source)
    np.testing.assert_allclose(logits_of(table, variables), source_logits(source), atol=1e-5, rtol=0)
    assert "upcycled: 6 arrays: f.experts.w_gate, f.experts.w_in, f.experts.w_out of blocks 0, 2" in report(plan)
    assert "fresh: 2 arrays: f.w_gate of blocks 0, 2" in report(plan)
    plan, _ = begin(make_config("stdlib_lm", DENSE), source)
    assert "fresh: 6 arrays: f.weights.w_gate, f.weights.w_in, f.weights.w_out of blocks 1, 3" in report(plan)
    assert "dropped: 8 arrays" in report(plan)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mixtral"])
def test_hugging_face_models(name: str) -> None:
    stored = Path(__file__).parent / "convert" / "stored" / name
    table = hf_table(stored)
    _, variables = begin(table, stored)
    logits_BLV = logits_of(table, variables, np.load(stored / "tokens.npy"))
    np.testing.assert_allclose(logits_BLV, np.load(stored / "logits.npy"), atol=1e-4, rtol=0)


def hf_table(folder: Path) -> ml_collections.ConfigDict:
    """The config of a model with experts in every block that begins with a Hugging Face model's folder."""
    settings, _, _ = open_hf(folder)
    table = make_table(settings, None)
    config_lib.override(table, ["model.moe_every=1", f"moe.num_experts={settings.moe.num_experts}"])
    return table


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["llama", "llama_biases", "qwen2", "qwen2_window", "qwen3", "qwen3_biases"])
@pytest.mark.parametrize("split", [False, True])
def test_upcycled_models_compute_what_transformers_does(name: str, split: bool, tmp_path: Path) -> None:
    model = reference.make_model(name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    table = hf_table(tmp_path)
    if split:
        config_lib.override(table, ["upcycle.method=split", "moe.expert_width=5", "moe.num_experts=12", "router.k=4"])
    _, variables = begin(table, tmp_path)
    tokens_BL = reference.make_tokens()
    np.testing.assert_allclose(
        logits_of(table, variables, tokens_BL), reference.run(model, tokens_BL), atol=1e-4, rtol=0
    )


def test_settings_that_change_the_function_are_named(folder: Path) -> None:
    table = make_config("stdlib_lm", "model.rope_theta=500", "model.kv_heads=1", "model.remat=full")
    plan, _ = begin(table, folder / "stdlib_lm-dense")
    notes = [line for line in report(plan).splitlines() if "there" in line]
    assert notes == ["  model.rope_theta = 500.0, but 10000.0 there: not the function that these weights learnt"]


def test_one_of_several_checkpoints(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "digits-dense", tmp_path / "run")
    save(tmp_path / "run", make_config("digits", DENSE), step=9)
    for path, step in (("run", 9), ("run/checkpoints/7", 7), ("run/checkpoints/9", 9)):
        assert open_source(tmp_path / path).name == str(tmp_path / "run" / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match="no checkpoint of step 8: there are 7, 9"):
        open_source(tmp_path / "run" / "checkpoints" / "8")


@pytest.mark.parametrize(
    ("path", "overrides", "words"),
    [
        ("digits-dense", ["model.depth=2"], "model.depth = 2 must be 4, as it is in .*digits-dense"),
        ("digits-dense", ["model.width=32"], "model.width = 32 must be 16"),
        ("digits-dense", ["model.activation=swiglu"], "model.activation = 'swiglu' must be 'gelu'"),
        ("digits-dense", ["model.patch_size=2"], r"^position has shape .*, and the config asks for \(16, 16\)"),
        ("digits-dense", ["moe.expert_width=12"], "moe.expert_width = 12 must be 24.*'split'"),
        ("digits-moe", ["moe.expert_width=12"], r"f.experts.w_in of block 1 has shape \(4, 16, 24\).*\(4, 16, 12\)"),
        ("stdlib_lm-dense", [], "holds a model of kind 'lm', and model.name is 'vit'"),
        (".", [], "is neither the workdir of a run with checkpoints nor the folder of a Hugging Face model"),
    ],
)
def test_what_does_not_fit(path: str, overrides: list[str], words: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=words):
        begin(make_config("digits", *overrides), folder / path)


def test_arrays_that_have_changed_since_they_were_saved_are_named(folder: Path, tmp_path: Path) -> None:
    """The record of one checkpoint beside the arrays of another, as all of them can be read."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(folder / "digits-dense", run)
    save(other, make_config("digits", DENSE), step=9)
    place = Path("data") / "metadata"
    record = json.loads((other / "checkpoints" / "9" / place).read_text())
    (run / "checkpoints" / "7" / place).write_text(json.dumps(_sealed({**record, "step": 7})))
    with pytest.raises(
        CheckpointError, match=r"7 is damaged: \d+ of its arrays have changed since it was written \(par"
    ):
        begin(make_config("digits"), run)


def test_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder"):
        begin(make_config("digits"), tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GemmaForCausalLM"]}))
    with pytest.raises(
        ValueError, match=r"GemmaForCausalLM can't be converted: .*Qwen3MoeForCausalLM, LlamaForCausalLM"
    ):
        open_source(tmp_path)
    run = Path(shutil.copytree(folder / "digits-dense", tmp_path / "run"))
    table = make_config("digits", DENSE, "model.mlp_width=12")
    (run / "config.json").write_text(config_lib.to_json(table))
    with pytest.raises(CheckpointError, match=r"w_in in checkpoint .* has shape \(4, 16, 24\), and .* \(4, 16, 12\)"):
        open_source(run)
    (run / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json can't be read"):
        open_source(run)
    shutil.rmtree(run / "checkpoints" / "7")
    (run / "config.json").write_text(config_lib.to_json(make_config("digits", DENSE)))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_source(run)
