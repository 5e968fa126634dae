"""The report: which experts tokens went to, against the model's own load; the page of runs of both kinds."""

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe import config as config_lib
from moe.data.tokenizer import Bytes
from moe.evaluation import charts, page, taken
from moe.evaluation.examples import Examples, trace_examples
from moe.evaluation.report import layer_names, report_page
from moe.layers.moe import MoeConfig
from moe.models import LmConfig, ViTConfig, make_model
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.routers import ROUTERS
from tests.pages import parse_page
from tests.test_imports import REPOSITORY

MOE = MoeConfig(num_experts=4, expert_width=8, group_size=2)
VIT = ViTConfig(width=16, depth=2, heads=2, mlp_width=8, moe_every=1, patch_size=4, pooling="class_token")
LM = LmConfig(width=16, depth=1, heads=2, mlp_width=8, moe_every=1, length=8)
LENGTH = {"vit": 5, "lm": 8}


def make_batch(kind: str, size: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.arange(size) != size - 1
    if kind == "vit":
        image = rng.uniform(size=(size, 8, 8, 1)).astype(np.float32)
        return {"image": image, "label": np.arange(size, dtype=np.int32), "mask": mask}
    tokens = rng.integers(32, 127, (size, 8)).astype(np.int32)
    segment = np.ones((size, 8), np.int32)
    segment[:, 6:] = 0
    position = np.tile(np.arange(8, dtype=np.int32), (size, 1))
    return {"tokens": tokens, "targets": tokens, "segment": segment, "position": position, "mask": mask}


def trace(kind: str, router: str, mesh: MeshConfig, batch: dict[str, np.ndarray]) -> tuple[Examples, Any]:
    """The traced examples, and the shares of the experts that the model itself reports, [N, E]."""
    config, chosen = {"vit": VIT, "lm": LM}[kind], ROUTERS[router](k=2) if router != "soft" else ROUTERS[router]()
    devices = make_mesh(mesh, jax.devices() if mesh.data == 8 else jax.devices()[:1])
    model = make_model(config, MOE, chosen)
    variables = model.init(jax.random.key(1))
    examples = trace_examples(config, MOE, chosen, variables, batch, devices)
    assert examples is not None
    first, other = ("image", {"mask": batch["mask"]}) if kind == "vit" else ("tokens", {})
    if kind == "lm":
        segment = np.where(batch["mask"][:, None], batch["segment"], 0)
        other = {"segment_BL": segment, "position_BL": batch["position"]}

    def apply(given: Any, inputs: Any, other: Any) -> Any:
        return model.apply(given, inputs, keys=None, mesh=devices, **other).routers.metrics["expert_load"]

    return examples, np.asarray(jax.jit(apply)(variables, batch[first], other))


@pytest.mark.parametrize(("kind", "router"), [("vit", "softmax"), ("vit", "random"), ("lm", "softmax")])
def test_the_experts_of_all_tokens_add_up_to_the_load_that_the_model_reports(kind: str, router: str) -> None:
    examples, load = trace(kind, router, MeshConfig(), make_batch(kind))
    layers = 2 if kind == "vit" else 1
    assert examples.expert.shape == examples.weight.shape == (layers, 8, LENGTH[kind], 2)
    for expert, weight, expected in zip(examples.expert, examples.weight, load, strict=True):
        counts = np.bincount(expert[weight > 0], minlength=4)
        np.testing.assert_allclose(counts / counts.sum(), expected, atol=1e-6)
    # The last example is padding, and so are the last tokens of a text.
    assert (examples.weight[:, -1] == 0).all()
    if kind == "lm":
        assert (examples.weight[:, :, 6:] == 0).all()
    assert (np.diff(examples.weight, axis=-1) <= 0).all()


def test_an_example_s_experts_are_the_same_beside_others_and_on_every_mesh() -> None:
    """Groups of two, and eight devices with a row each, so that whole groups are sixteen rows."""
    batch = make_batch("vit", 16)
    alone, _ = trace("vit", "softmax", MeshConfig(), {name: values[4:12] for name, values in batch.items()})
    spread, _ = trace("vit", "softmax", MeshConfig(data=8), batch)
    np.testing.assert_array_equal(alone.expert[:, :4], spread.expert[:, 4:])
    np.testing.assert_allclose(alone.weight[:, :4], spread.weight[:, 4:], atol=1e-5)


def test_soft_slots_show_the_experts_that_a_token_reads_most_from() -> None:
    examples, _ = trace("vit", "soft", MeshConfig(), make_batch("vit"))
    assert (examples.weight[:, :-1, :, 0] >= 0.25).all()
    assert (examples.weight[:, :-1].sum(-1) <= 1 + 1e-5).all()


def test_a_model_without_experts_has_no_examples_and_a_page() -> None:
    config = dataclasses.replace(VIT, moe_every=0)
    router = ROUTERS["softmax"]()
    variables = make_model(config, MOE, router).init(jax.random.key(0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert trace_examples(config, MOE, router, variables, make_batch("vit"), mesh) is None


def make_workdir(folder: Path, name: str, *overrides: str) -> config_lib.Config:
    """The files of a run of two log points, one of them cut off in the middle of a line by a crash."""
    table = config_lib.load_file(str(REPOSITORY / f"configs/{name}.py"))
    config_lib.override(table, overrides)
    config = config_lib.resolve(table)
    lines = [
        {
            "step": step,
            "train/loss": 2 / step,
            "router/load": 0.1,
            "moe/layer_1/entropy": 1.5,
            "examples_per_second": 9e4,
        }
        for step in (1, 2)
    ]
    load = [{"step": step, "load": {"layer_1": [step / 8] * 8, "layer_3": [1 / 8] * 8}} for step in (1, 2)]
    (folder / "config.json").write_text(config_lib.to_json(table))
    (folder / "result.json").write_text(json.dumps({"step": 2, "test/loss": float("nan")}))
    (folder / "environment.json").write_text(json.dumps({"devices": "8 × <v5e>", "jax": "1.2.3"}))
    for file, values in (("metrics.jsonl", lines), ("load.jsonl", load)):
        (folder / file).write_text("".join(json.dumps(value) + "\n" for value in values) + '{"step": 3, "tr')
    return config


def test_the_page_shows_curves_heat_patches_speed_config_and_environment(tmp_path: Path) -> None:
    config = make_workdir(tmp_path, "digits", "model.patch_size=4")
    batch = make_batch("vit")
    expert = np.tile(np.array([3, 5], np.int32), (2, 8, 4, 1))
    examples = Examples(batch, expert, np.where(expert == 3, 0.75, 0.25).astype(np.float32))
    text = report_page(config, tmp_path, examples)
    shown = parse_page(text)
    for words in ("softmax, digits", "layer 1", "layer 3", "90,000", "8 × <v5e>", "1.2.3", "label 2", "expert 3"):
        assert words in shown.text, words
    assert shown.text.count("expert 3 (0.75), 5 (0.25)") == 2 * 8 * 4
    assert "canvas" in shown.tags
    assert text.count('fill="#cc79a7"') == 2 * 8 * 4


def test_the_page_of_a_text_colours_its_tokens(tmp_path: Path) -> None:
    config = make_workdir(tmp_path, "stdlib_lm", "model.depth=1")
    batch = make_batch("lm", 2)
    batch["tokens"][0, :6] = list(b"<a>\n\xc3\xa9")
    expert = np.zeros((1, 2, 8, 2), np.int32)
    expert[..., 0] = np.arange(8) % 4
    shown = parse_page(report_page(config, tmp_path, Examples(batch, expert, np.ones((1, 2, 8, 2), np.float32))))
    assert "<a>⏎\n" in shown.text
    assert layer_names(config) == ["layer 0"]
    assert shown.tags.count("span") >= 6


def test_the_page_of_a_folder_with_nothing_in_it_is_a_page(tmp_path: Path) -> None:
    config = make_workdir(tmp_path, "digits")
    for path in tmp_path.iterdir():
        path.unlink()
    text = parse_page(report_page(config, tmp_path, None)).text
    for name, what in (("metrics", "learning curves"), ("load", "load of the experts over time")):
        assert f"no {what}, as {tmp_path / name}.jsonl has no line of a step" in text


LAYER = {
    "load_cv": 0.5,
    "max_violation": None,
    "mutual_information": {"class": 0.25},
    "experts_per_token_histogram": [0, 0.25, 0.75],
    "choice_similarity": np.eye(2).tolist(),
    "parameter_similarity": [[1, -0.1], [-0.1, 1]],
}
ROUTING = {"layers": {"layer_1": LAYER, "layer_3": LAYER | {"max_violation": 1.5}}}


def page_charts(folder: Path, config: config_lib.Config) -> list[dict[str, Any]]:
    """What the curves of the page say under the pointer."""
    text = report_page(config, folder, None, routing=ROUTING)
    return [json.loads(html.unescape(found)) for found in re.findall('data-series="([^"]*)"', text)]


def test_the_page_shows_the_routing_of_the_test_set(tmp_path: Path) -> None:
    config = make_workdir(tmp_path, "digits")
    shown = parse_page(report_page(config, tmp_path, None, routing=ROUTING))
    for row in ("mean0.50.5", "minus 1-1.5", "tells of the class0.250.25"):
        assert row in shown.text.replace("\n", ""), row
    assert shown.text.count("similarity of experts by parameters") == 2
    (counts,) = (one for one in page_charts(tmp_path, config) if one["x"] == [0, 2])
    assert counts["along"] == "experts"
    assert "tokens whose experts changed" not in shown.text
    assert "--diagnostics" not in shown.text


def test_a_page_without_the_routing_of_the_test_set_says_how_to_have_it(tmp_path: Path) -> None:
    config = make_workdir(tmp_path, "digits")
    sentence = "not measured for this page: evaluate.py --diagnostics --report has it"
    assert sentence in parse_page(report_page(config, tmp_path, None)).text
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, moe_every=0))
    assert sentence not in parse_page(report_page(dense, tmp_path, None)).text


def test_an_interval_stands_beside_its_measure(tmp_path: Path) -> None:
    config = make_workdir(tmp_path, "digits")
    evaluation = {"test/loss": 0.5, "test/loss_low": 0.25, "test/loss_high": 0.75, "step": 6}
    assert "test/loss0.5 [0.25, 0.75]" in parse_page(report_page(config, tmp_path, None, evaluation)).text


def test_a_load_stands_at_the_step_of_its_own_line(tmp_path: Path) -> None:
    config = make_workdir(tmp_path, "digits")
    load = {"layer_1": [1 / 8] * 8}
    huge = {"layer_1": [10**400] * 8}
    lines = [{"step": 1, "load": load}, {"step": 2}, {"step": 3, "load": load}, {"step": 4, "load": huge}]
    (tmp_path / "load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "steps 1 to 3; experts 0 to 7" in parse_page(report_page(config, tmp_path, None)).text


def test_the_page_leaves_out_what_is_damaged(tmp_path: Path) -> None:
    """Bytes that are no text, numbers that are none, a line of the load without one."""
    config = make_workdir(tmp_path, "digits")
    more = {"time/elapsed_seconds": 3.0, "time/training_seconds": "x", "time/evaluation_seconds": 2.0}
    more |= {"examples_per_second": float("nan"), "train/loss": 10**400}
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n" + json.dumps({"step": 4, **more}).encode() + b"\n")
    load = [{"step": 7}, {"step": 8, "load": {"layer_1": [1 / 8] * 8}}, {"step": 9, "load": {"layer_1": [1 / 8] * 8}}]
    (tmp_path / "load.jsonl").write_text("".join(json.dumps(value) + "\n" for value in load))
    shown = parse_page(report_page(config, tmp_path, None))
    for words in ("steps 8 to 9", "90,000", "evaluation seconds", "2.0"):
        assert words in shown.text, words
    assert "training seconds" not in shown.text


def test_pieces_are_what_each_token_adds() -> None:
    assert taken.pieces([104, 195, 169, 256, 10], Bytes().decode) == ["h", "\ufffd", "∎", "∎", "\n"]


def test_lines_leave_out_what_is_no_number_and_are_thinned() -> None:
    values = [float("nan"), 1.0, float("inf"), 3.0]
    chart = charts.line_chart("t", [charts.Series("a", [1, 2, 3, 4], values)])
    assert "M48.0 185.0L390.0 8.0" in chart
    assert charts.line_chart("t", [charts.Series("a", [1], [float("nan")])]) == ""
    long = charts.line_chart("t", [charts.Series("a", list(range(10**4)), [0.5] * 10**4)])
    assert long.count("L") < 400


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (2.0, 2.0, [1, 1.5, 2, 2.5, 3])],
)
def test_ticks_are_round_and_hold_all_values(low: float, high: float, ticks: list[float]) -> None:
    np.testing.assert_allclose(charts.nice_ticks(low, high), ticks)


def test_experts_have_colours_of_their_own_and_text_stays_text() -> None:
    colours = [page.colour(index) for index in range(64)]
    assert len(set(colours)) == 64
    assert all(len(one) == 7 for one in colours)
    assert page.escape('<a href="x">\0\ud800') == "&lt;a href=&quot;x&quot;&gt;\ufffd\ufffd"
