"""The interface of lm-evaluation-harness against the model's own logits in NumPy, with and without the package."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from moe import cli, harness
from moe.config import Config
from moe.data.pipeline import DataConfig
from moe.data.text import TextConfig
from moe.generate import Sampling
from moe.harness import HarnessLM
from moe.models import LmConfig, Variables, ViTConfig, make_model
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.workdir import Loaded
from tests.models.helpers import ROUTER
from tests.routers.helpers import COMPILER_OPTIONS
from tests.test_generate import ONE_EACH

LENGTH, BEGIN = 12, 256
CONFIG = Config(
    seed=0,
    steps=1,
    batch_size=4,
    model=LmConfig(length=LENGTH, width=8, depth=1, heads=2, moe_every=1),
    moe=ONE_EACH,
    router=ROUTER,
    data=TextConfig(),
)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """A model of random weights, large enough to prefer some bytes, on two devices."""
    model = make_model(CONFIG.model, CONFIG.moe, CONFIG.router)
    variables = model.init(jax.random.key(0))
    params = jax.tree.map(lambda w: 3 * w, variables.params)
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    return Loaded(CONFIG, mesh, model, Variables(params, variables.router_state))


@pytest.fixture(scope="module")
def lm(loaded: Loaded) -> HarnessLM:
    return HarnessLM(loaded, batch_size=3)


@pytest.fixture(scope="module")
def log_probs(loaded: Loaded) -> Any:
    """Log probabilities [L, V] of what follows each token of one sequence, run by itself."""
    alone = make_mesh(MeshConfig(), jax.devices()[:1])
    apply = jax.jit(
        lambda tokens: loaded.model.apply(loaded.variables, tokens, keys=None, mesh=alone).logits,
        compiler_options=COMPILER_OPTIONS,
    )

    def of(tokens: list[int]) -> np.ndarray:
        padded = np.array([tokens + [0] * (LENGTH - len(tokens))], np.int32)
        logits = np.asarray(apply(padded), np.float64)[0, : len(tokens)]
        return (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )

    return of


def asked(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_log_likelihood_is_that_of_the_continuation_behind_its_context(lm: HarnessLM, log_probs: Any) -> None:
    pairs = [("ab", "cde"), ("", "x"), ("abcdefg", "h"), ("ab ", "c"), ("a", "")]
    found = lm.loglikelihood(asked(*pairs))
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        tokens = [BEGIN, *(context + continuation).encode()]
        counted = len((context + continuation).encode()) - len(context.rstrip())
        table, targets = log_probs(tokens[:-1]), tokens[1:]
        own = [table[i, targets[i]] for i in range(len(targets) - counted, len(targets))]
        assert value == pytest.approx(sum(own), rel=1e-5)
        best = [table[i].argmax() == targets[i] for i in range(len(targets) - counted, len(targets))]
        assert is_greedy == all(best)


def test_what_the_model_would_say_is_greedy(lm: HarnessLM, log_probs: Any) -> None:
    tokens = [BEGIN, *b"ab"]
    for _ in range(3):
        tokens.append(int(log_probs(tokens)[-1, :128].argmax()))
    text = bytes(tokens[3:]).decode()
    best = [log_probs(tokens[:n])[-1].argmax() == tokens[n] for n in (3, 4, 5)]
    assert lm.loglikelihood(asked(("ab", text)))[0][1] == all(best)


def test_a_long_context_loses_its_beginning_and_a_long_continuation_is_refused(
    lm: HarnessLM, log_probs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    context, continuation = "abcdefghijklmnopqrst", "uv"
    ((value, _),) = lm.loglikelihood(asked((context, continuation)))
    tokens = list((context + continuation).encode())[-(LENGTH + 1) :]
    table = log_probs(tokens[:-1])
    assert value == pytest.approx(table[-2, tokens[-2]] + table[-1, tokens[-1]], rel=1e-5)
    assert "beginnings of 1 of 1 contexts" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"13 tokens exceeds model.length = 12"):
        lm.loglikelihood(asked(("a", "b" * 13)))


@pytest.mark.parametrize("size", [0, 5, 12, 13, 24, 30])
def test_rolling_counts_every_token_once_with_as_much_before_it_as_fits(
    size: int, lm: HarnessLM, log_probs: Any
) -> None:
    text = "".join(chr(97 + i % 26) for i in range(size))
    (found,) = lm.loglikelihood_rolling(asked((text,)))
    whole, expected, done = [BEGIN, *text.encode()], 0.0, 0
    while done < size:  # as in the interface's own example: each window but the last predicts as many as it reads
        end = min(done + LENGTH, size)
        start = max(0, end - LENGTH)
        table = log_probs(whole[start:end])
        expected += sum(table[i - start, whole[i + 1]] for i in range(done, end))
        done = end
    assert found == pytest.approx(expected, rel=1e-5)


def test_texts_that_go_on_are_the_likeliest_and_end_before_what_ends_them(
    lm: HarnessLM, log_probs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(prompt: str, many: int) -> bytes:
        tokens = [BEGIN, *prompt.encode()]
        for _ in range(many):
            tokens.append(int(log_probs(tokens)[-1].argmax()))
        return bytes(token for token in tokens[len(prompt) + 1 :] if token < 256)

    whole = {prompt: greedy(prompt, 4).decode(errors="replace") for prompt in ("a", "bcd", "")}
    settings = {"until": [], "max_gen_toks": 4, "do_sample": False, "temperature": 0.0}
    found = lm.generate_until(asked(*((prompt, settings) for prompt in whole)))
    assert dict(zip(whole, found, strict=True)) == whole
    stop = whole["bcd"][1]
    (short,) = lm.generate_until(asked(("bcd", {**settings, "until": stop})))
    assert short == whole["bcd"].split(stop)[0]
    assert not capsys.readouterr().err
    assert len(lm.generate_until(asked(("a" * 20, {"until": ["\n\n\n"]})))) == 1
    err = capsys.readouterr().err
    assert "6 tokens are written at most, not 256" in err
    assert "beginnings of 1 of 1 contexts" in err
    with pytest.raises(ValueError, match="repetition_penalty"):
        lm.generate_until(asked(("a", {"repetition_penalty": 2})))


def test_sampling_follows_the_task(lm: HarnessLM) -> None:
    given = {"until": "\n", "do_sample": True, "temperature": 0.5, "top_k": 3, "max_gen_toks": 9}
    assert lm._settings(given) == (["\n"], Sampling(0.5, 3, 1.0), 9)
    assert lm._settings({"temperature": 0.5}) == ([], Sampling(0.0), 256)


def test_a_model_of_images_is_refused(loaded: Loaded) -> None:
    import dataclasses

    images = dataclasses.replace(CONFIG, model=ViTConfig(), data=DataConfig())
    with pytest.raises(ValueError, match="model of images"):
        HarnessLM(loaded._replace(config=images))


def test_without_the_package_the_program_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_info:
        cli.run(harness.main, ["--workdir=none", "--tasks=none"])
    assert exit_info.value.code == cli.USAGE
    assert "pip install 'moe-jax[lm-eval]'" in capsys.readouterr().err


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: KIND
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
"""
CHOICE = 'doc_to_choice: ["a", "b"]\nmetric_list: [{metric: acc}]\n'


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "more", "measure"),
    [
        ("multiple_choice", CHOICE, "acc,none"),
        ("loglikelihood_rolling", "metric_list: [{metric: bits_per_byte}]\n", "bits_per_byte,none"),
        (
            "generate_until",
            "generation_kwargs: {until: ['q'], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]\n",
            "exact_match,none",
        ),
    ],
)
def test_the_package_runs_a_local_task(kind: str, more: str, measure: str, lm: HarnessLM, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    assert isinstance(lm, lm_eval.api.model.LM)
    docs = [{"question": f"{n}+1=", "answer": "ab"[n % 2]} for n in range(5)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    text = TASK.replace("DATA", str(data)).replace("KIND", kind) + more
    if kind == "loglikelihood_rolling":
        text = text.replace('doc_to_target: "{{answer}}"', 'doc_to_target: "{{question}}"').replace(
            'doc_to_text: "{{question}}"', 'doc_to_text: ""'
        )
    (tmp_path / "sums.yaml").write_text(text)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=["sums"], task_manager=manager, bootstrap_iters=0)
    value = found["results"]["sums"][measure]
    if kind == "multiple_choice":
        pairs = [[(doc["question"], f" {choice}") for choice in "ab"] for doc in docs]
        scores = [[score for score, _ in lm.loglikelihood(asked(*pair))] for pair in pairs]
        assert value == np.mean(["ab"[np.argmax(s)] == d["answer"] for s, d in zip(scores, docs, strict=True)])
    elif kind == "loglikelihood_rolling":
        total = sum(lm.loglikelihood_rolling(asked(*((doc["question"],) for doc in docs))))
        size = sum(len(doc["question"]) for doc in docs)
        assert value == pytest.approx(-total / np.log(2) / size)
    else:
        assert 0 <= value <= 1
