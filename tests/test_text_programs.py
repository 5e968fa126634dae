"""The programs on text as a user runs them: train on files, evaluate, generate; mistakes in one sentence."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import evaluate
import train
from moe import cli, generate
from tests.pages import parse_page
from tests.test_step import compile_fast

__all__ = ["compile_fast"]

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "seed": 0, "steps": 3, "batch_size": 8, "log_every": 1, "loss": "softmax", "accumulation_steps": 2,
        "data": {"name": "files", "paths": (PATH,), "test_paths": (PATH,), "length": 12, "threads": 0},
        "model": {"name": "lm", "vocab_size": 257, "length": 16, "width": 8, "depth": 1, "heads": 2, "moe_every": 1,
                  "rope_scaling": {"name": "yarn", "yarn": {"factor": 2.0, "original_length": 8}}},
        "moe": {"num_experts": 2, "expert_width": 8, "group_size": 1},
        "router": {"name": "softmax", "k": 1},
        "optimizer": {"warmup_steps": 0},
        "mesh": {"data": 2, "fsdp": 2, "expert": 1, "tensor": 1},
    })
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config of two texts, on four devices."""
    for number, text in enumerate(("The cat sat on the mät. " * 9, "def main():\n    return 0\n")):
        (tmp_path / f"{number}.txt").write_text(text)
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace("PATH", repr(str(tmp_path / "*.txt"))))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
    devices = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    return f"--config={path}"


def run(program: object, *argv: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.run(program.main, list(argv))  # type: ignore[attr-defined]
    return int(exit_info.value.code or 0)


def test_train_evaluate_and_generate(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = tmp_path / "run"
    assert run(train, config, f"--workdir={workdir}") == 0
    out = capsys.readouterr().out
    result = json.loads((workdir / "result.json").read_text())
    assert "test bits_per_byte" in out
    assert f"manifest/files: {result['manifest/files']}\n" in out
    size = sum(len(path.read_bytes()) for path in tmp_path.glob("*.txt"))
    # Every byte is a target, and the end of each of the two texts is one as well, which stands for none.
    expected = result["test/loss"] * (size + 2) / size / np.log(2)
    assert result["test/bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert result["test/perplexity"] == pytest.approx(np.exp(result["test/loss"]), rel=1e-6)
    each = [hashlib.sha256(path.read_bytes()).digest() for path in sorted(tmp_path.glob("*.txt"))]
    assert result["manifest/files"] == hashlib.sha256(b"".join(each)).hexdigest()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/cross_entropy"] for line in lines if "train/loss" in line]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(np.log(257), rel=0.3)

    page = parse_page((workdir / "report.html").read_text())
    assert "What the experts take" in page.text
    assert "cat" in page.text
    assert run(evaluate, f"--workdir={workdir}") == 0
    assert json.loads((workdir / "evaluation.json").read_text()) == result
    assert result["test/loss_low"] <= result["test/loss"] <= result["test/loss_high"]
    assert run(evaluate, f"--workdir={workdir}", "--diagnostics") == 0
    routing = json.loads((workdir / "routing.json").read_text())
    assert routing["tokens"] == size + 2
    assert set(routing["layers"]["layer_0"]["mutual_information"]) == {"token", "position"}
    assert run(evaluate, f"--workdir={workdir}", "--few-shot") == cli.USAGE
    assert "this is a language model" in capsys.readouterr().err
    capsys.readouterr()
    assert run(generate, f"--workdir={workdir}", "--prompt=The", "--prompt=", "--max-tokens=4", "--top-k=5") == 0
    assert capsys.readouterr().out.startswith("The")

    across = "--config.router.name=expert_choice"
    sentence = "router expert_choice chooses a token's experts by tokens that come after it"
    assert run(evaluate, f"--workdir={workdir}", across) == 0
    assert sentence in capsys.readouterr().out
    assert run(generate, f"--workdir={workdir}", "--prompt=The", across) == cli.USAGE
    assert sentence in capsys.readouterr().err


def test_mistakes_are_one_sentence(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override, sentence in (
        ("model.vocab_size=200", "the tokenizer has 257 tokens and the model a vocabulary of 200"),
        ("data.length=17", "data.length = 17 tokens exceed model.length = 16"),
        ("loss=sigmoid", "loss = 'sigmoid' is for images"),
        ("model.rope_scaling.yarn.factor=0.5", "model.rope_scaling.factor = 0.5"),
    ):
        assert run(train, config, f"--workdir={tmp_path / 'run'}", f"--config.{override}") == cli.USAGE
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert sentence in err
    assert not (tmp_path / "run").exists()
