"""compare.py: means and errors by hand, pairs of seeds, the fields that differ, mistakes in one sentence."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import compare
from moe import cli
from moe import config as config_lib
from moe.compare.runs import flat_settings, group_runs, read_run
from moe.compare.statistics import estimate
from tests.pages import parse_page
from tests.test_imports import REPOSITORY


def make_run(folder: Path, *overrides: str, accuracy: float = 0.9, config: str = "configs/digits.py") -> Path:
    """What a finished run leaves behind, as far as it is compared."""
    table = config_lib.load_file(str(REPOSITORY / config))
    config_lib.override(table, overrides)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_lib.to_json(table))
    result = {"step": table.steps, "test/accuracy": accuracy, "test/loss": 1 - accuracy, "params/sha256": "0" * 64}
    (folder / "result.json").write_text(json.dumps(result))
    lines: list[dict[str, Any]] = [
        {"step": 100 * n, "train/loss": 1 / n, "examples_per_second": 10.0 * n} for n in (1, 2, 3)
    ]
    lines += [{"step": 300, "test/accuracy": accuracy}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 400, "trai')
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two routers; seeds 0, 1, 2 of the first and 1, 2, 3 of the second."""
    monkeypatch.chdir(tmp_path)
    made = []
    for seed, accuracy in ((0, 0.90), (1, 0.92), (2, 0.97)):
        made.append(make_run(tmp_path / f"soft-{seed}", f"seed={seed}", accuracy=accuracy))
    for seed, accuracy in ((1, 0.93), (2, 0.95), (3, 0.99)):
        path = tmp_path / f"sparse-{seed}"
        made.append(make_run(path, f"seed={seed}", "router.name=sparse_topk", f"mesh.data={seed}", accuracy=accuracy))
    return [str(path) for path in made]


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.run(compare.main, list(argv))
    return int(exit_info.value.code or 0)


def sentence(capsys: pytest.CaptureFixture[str], code: int, expected: int, *parts: str) -> None:
    err = capsys.readouterr().err
    assert code == expected, err
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_means_errors_and_paired_differences_by_hand(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracies .90 .92 .97 and .93 .95 .99; of the seeds 1 and 2 that both have, differences .01 and -.02."""
    assert run(*runs, "--json=out.json") == 0
    got = json.loads(Path("out.json").read_text())
    soft = got["estimates"]["softmax"]["test/accuracy"]
    deviation = math.sqrt(((0.9 - 0.93) ** 2 + (0.92 - 0.93) ** 2 + (0.97 - 0.93) ** 2) / 2)
    assert soft == {"mean": pytest.approx(0.93), "error": pytest.approx(deviation / math.sqrt(3)), "count": 3}
    pair = got["differences"]["sparse_topk"]["test/accuracy"]
    assert pair == {"mean": pytest.approx(-0.005), "error": pytest.approx(0.015), "count": 2}
    assert got["differing"] == {"router.name": ["softmax", "sparse_topk"]}
    assert got["estimates"]["softmax"]["examples_per_second"]["mean"] == 20
    out = capsys.readouterr().out
    assert "softmax      3      0.930 ± 0.021" in out
    assert "-0.005 ± 0.015" in out


def test_the_page_is_one_file_and_says_what_the_table_says(runs: list[str]) -> None:
    assert run(*runs) == 0
    page = parse_page(Path("compare.html").read_text())
    for words in ("0.930 ± 0.021", "minus softmax", "router.name", *runs):
        assert words in page.text
    # A dot chart for each of three measures, and curves of train loss; test accuracy was measured once.
    assert page.tags.count("svg") == 4


def test_the_baseline_is_the_config_of_the_run_that_is_named(runs: list[str]) -> None:
    assert run(*runs, f"--baseline={runs[4]}", "--json=out.json") == 0
    got = json.loads(Path("out.json").read_text())
    assert got["baseline"] == "sparse_topk"
    assert got["differences"]["softmax"]["test/accuracy"]["mean"] == pytest.approx(0.005)
    # One that isn't among the runs joins them, and one that is given twice counts once.
    assert run(runs[0], runs[0], f"--baseline={runs[4]}", "--json=out.json") == 0
    got = json.loads(Path("out.json").read_text())
    assert got["estimates"]["softmax"]["test/accuracy"]["count"] == 1
    assert got["differences"] == {}


def test_one_run_is_a_table_of_its_own(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(runs[0]) == 0
    assert capsys.readouterr().out.startswith("image: digits, test; 1 run of 1 config\n")


def test_options_that_a_config_does_not_choose_make_no_difference(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "seed=1", "router.sparse_topk.p=2", "log_every=7", "data.threads=3")
    make_run(tmp_path / "c", "router.softmax.noise=0.5")
    make_run(tmp_path / "d", "router.softmax.noise=0.25", "moe.num_experts=4")
    groups, differing = group_runs([read_run(tmp_path / name) for name in "abcd"])
    assert [[run.path.name for run in group.runs] for group in groups] == [["a", "b"], ["c"], ["d"]]
    assert differing == {"moe.num_experts": [8, 8, 4], "router.softmax.noise": [1.0, 0.5, 0.25]}
    assert groups[1].name == "moe.num_experts=8, router.softmax.noise=0.5"
    assert "router.softmax.noise" in flat_settings({"router": {"name": "softmax", "softmax": {"noise": 1}}})


def test_an_estimate_shows_two_digits_of_its_error() -> None:
    assert str(estimate([1.0, 2.0, 4.0])) == "2.33 ± 0.88"
    assert str(estimate([0.25])) == "0.25"
    assert str(estimate([1.0, math.nan])) == "nan"
    assert str(estimate([math.inf, 1.0, 2.0])) == "inf"
    assert str(estimate([3.0, 3.0])) == "3 ± 0"
    assert str(estimate([1000.0, 2000.0])) == "1,500 ± 500"
    # One scan of 360 more in every seed: the rounding of these differences is no error of anything.
    assert str(estimate([(n + 1) / 360 - n / 360 for n in (99, 299, 320)])) == "0.002778 ± 0"


def test_what_does_not_compare_is_one_sentence(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("lm"), config="configs/stdlib_lm.py")
    sentence(capsys, run(*runs, "lm"), cli.USAGE, "text: stdlib", "image: digits", "different tasks")
    make_run(Path("again"))
    sentence(capsys, run(*runs, "again"), cli.USAGE, "soft-0 and again", "same seed 0", "leave one")
    (Path("again") / "result.json").unlink()
    sentence(capsys, run(*runs, "again"), cli.FAILURE, "again has no result.json", "train.py")
    Path("empty").mkdir()
    sentence(capsys, run(*runs, "empty"), cli.FAILURE, "empty is not the workdir of a run")
    sentence(capsys, run(*runs, "nowhere"), cli.FAILURE, "nowhere is not the workdir of a run")
    (Path(runs[0]) / "result.json").write_text('{"step": 2}')
    sentence(capsys, run(*runs), cli.FAILURE, "result of step 2 and a config of 3000 steps")
    (Path(runs[0]) / "result.json").write_text("[" * 100_000)
    sentence(capsys, run(*runs), cli.FAILURE, "result.json can't be read")
    (Path(runs[0]) / "result.json").write_text('{"step": "3000", "test/loss": 1}')
    sentence(capsys, run(*runs), cli.FAILURE, "result of step '3000' and a config of 3000 steps")
    (Path(runs[0]) / "result.json").write_text('{"step": 3000, "test/loss": "low"}')
    sentence(capsys, run(*runs), cli.FAILURE, "result.json", "no measure of a test set")
    sentence(capsys, run(*runs, "--config.seed=1"), cli.USAGE, "takes no config fields")
    sentence(capsys, run(), cli.USAGE, "RUN")
    assert not Path("compare.html").exists()


@pytest.mark.parametrize("flag", ["page", "json"])
def test_files_that_can_not_be_written_are_named_before_anything_is_compared(
    flag: str, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    for name in ("", "folder"):
        sentence(capsys, run(*runs, f"--{flag}={name}"), cli.USAGE, f"--{flag}={name} ", "a folder")
    sentence(capsys, run(*runs, f"--{flag}=no/such/file"), cli.USAGE, f"--{flag}=no/such/file", "no folder no/such")
    assert sorted(path.name for path in Path().iterdir()) == sorted(["folder", *(Path(name).name for name in runs)])


def test_what_is_damaged_in_a_log_is_left_out_and_what_is_no_number_is_null(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    log = Path(runs[0]) / "metrics.jsonl"
    log.write_bytes(
        b"\xff\xfe\n" + log.read_bytes() + b'\n{"step": 500, "examples_per_second": 1' + b"0" * 400 + b"}\n"
    )
    result = json.loads((Path(runs[3]) / "result.json").read_text()) | {"test/loss": math.nan, "test/ece": 10**400}
    (Path(runs[3]) / "result.json").write_text(json.dumps(result))
    config = (Path(runs[1]) / "config.json").read_text()
    assert run(*runs, "--json=out.json") == 0
    assert "nan" in capsys.readouterr().out
    assert "NaN" not in Path("out.json").read_text()
    got = json.loads(Path("out.json").read_text())["estimates"]
    assert got["sparse_topk"]["test/loss"] == {"mean": None, "error": None, "count": 3}
    assert got["softmax"]["examples_per_second"]["mean"] == 20
    (Path(runs[1]) / "config.json").write_text(config.replace('"name": "vit"', '"name": ["vit"]'))
    sentence(capsys, run(*runs), cli.USAGE, "different tasks")


def test_runs_on_different_texts_do_not_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, manifest in enumerate(("a" * 64, "b" * 64)):
        path = make_run(tmp_path / str(seed), f"seed={seed}", config="configs/stdlib_lm.py")
        result = json.loads((path / "result.json").read_text()) | {"manifest/stdlib": manifest}
        (path / "result.json").write_text(json.dumps(result))
    code = run(str(tmp_path / "0"), str(tmp_path / "1"))
    sentence(capsys, code, cli.USAGE, "different texts", "aaaaaaaaaaaa…", "bbbbbbbbbbbb…")


def test_what_is_measured_by_token_does_not_compare_between_tokenizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, end in enumerate(("", "<end>")):
        path = make_run(
            tmp_path / str(seed), f"seed={seed}", f"data.tokenizer.end={end}", config="configs/stdlib_lm.py"
        )
        result = json.loads((path / "result.json").read_text()) | {"test/bits_per_byte": 1.5}
        (path / "result.json").write_text(json.dumps(result))
    assert run("0", "1", "--json=figures.json") == 0
    assert "tokenizers that differ" in capsys.readouterr().out
    found = json.loads(Path("figures.json").read_text())["estimates"]
    assert [list(one) for one in found.values()] == [["test/bits_per_byte", "examples_per_second"]] * 2
    assert "train loss" not in parse_page(Path("compare.html").read_text()).text


def test_what_a_config_says_is_text_in_the_page(runs: list[str]) -> None:
    path = Path(runs[0]) / "config.json"
    path.write_text(path.read_text().replace('"init_from": ""', '"init_from": "<script>alert(1)</script>\\u0007"'))
    assert run(*runs) == 0
    text = Path("compare.html").read_text()
    assert parse_page(text).tags.count("script") == 1
    assert "<script>alert" not in text
