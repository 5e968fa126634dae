"""Generation: the cache changes nothing, draws are what they should be, and the program as a user runs it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import train
from moe import cli, generate
from moe import config as config_lib
from moe.checkpoint import Checkpoints
from moe.data.tokenizer import Bytes
from moe.generate import Sampling, encode_prompts, sample
from moe.guard import GuardConfig, init_guard
from moe.models import LmConfig, Model, make_model
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.workdir import load_model
from tests.models.helpers import MOE, ODD, ONE_DEVICE, PLAIN, ROUTER, VOCABULARY, make_variables
from tests.routers.helpers import COMPILER_OPTIONS
from tests.test_step import compile_fast

__all__ = ["compile_fast"]

LENGTH, NEW = 16, 7
PROMPTS = [[3], [5, 1, 4, 1, 5, 9], [2, 7, 1]]
ONE_EACH = dataclasses.replace(MOE, group_size=1)
GREEDY = Sampling(temperature=0.0)
TABLE = {
    "seed": 0,
    "steps": 1,
    "batch_size": 8,
    "model": {"name": "lm", "length": 40, "width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "moe_every": 1},
    "moe": {"num_experts": 2, "expert_width": 8},
    "router": {"name": "softmax", "k": 1},
    "optimizer": {"warmup_steps": 0},
    "mesh": {"data": -1, "fsdp": 1, "expert": 1, "tensor": 1},
}


class Few(Bytes):
    """As many tokens as the small models have, and neither begin nor end among them."""

    vocab_size = VOCABULARY
    begin = -2
    end = -1


def run(config: LmConfig, prompts: list[list[int]], mesh: jax.sharding.Mesh = ONE_DEVICE) -> np.ndarray:
    """The tokens that follow each prompt, [prompts, NEW]."""
    model = make_model(config, ONE_EACH, ROUTER)
    steps = generate.generate(
        model, make_variables(config), prompts, NEW, sampling=GREEDY, seed=0, mesh=mesh, tokenizer=Few()
    )
    return np.stack(list(steps), axis=1)


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.nightly), "odd"])
def test_greedy_decoding_with_the_cache_is_that_without(name: str) -> None:
    """Prompts of different lengths together; the odd model sees three tokens, and has dense blocks first."""
    config = dataclasses.replace({"plain": PLAIN, "odd": ODD}[name], length=LENGTH)
    model, variables = make_model(config, ONE_EACH, ROUTER), make_variables(config)
    call = jax.jit(
        lambda tokens, segment: model.apply(variables, tokens, keys=None, mesh=ONE_DEVICE, segment_BL=segment).logits,
        compiler_options=COMPILER_OPTIONS,
    )
    texts = [list(prompt) for prompt in PROMPTS]
    margins = []
    for _ in range(NEW):
        tokens = np.array([text + [0] * (LENGTH - len(text)) for text in texts], np.int32)
        segment = np.array([[1] * len(text) + [0] * (LENGTH - len(text)) for text in texts], np.int32)
        logits = np.asarray(call(tokens, segment))
        for b, text in enumerate(texts):
            row = logits[b, len(text) - 1]
            margins.append(np.diff(np.sort(row)[-2:])[0])
            text.append(int(row.argmax()))
    assert min(margins) > 1e-4
    expected = np.array([text[-NEW:] for text in texts])
    np.testing.assert_array_equal(run(config, PROMPTS), expected)
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    if name == "odd":
        np.testing.assert_array_equal(run(config, PROMPTS[1:2])[0], expected[1])
        mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
        np.testing.assert_array_equal(run(dataclasses.replace(config, tied_head=True), PROMPTS, mesh), expected)


def test_draws_follow_temperature_top_k_and_top_p() -> None:
    """Probabilities .5, .3, .15, .05: which tokens come, and how often the first does, over 4000 draws."""
    probs, draws = np.array([0.5, 0.3, 0.15, 0.05]), 4000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32))[None], (draws, 4))
    keys = jax.random.split(jax.random.key(0), draws)
    cases = {
        Sampling(): ({0, 1, 2, 3}, 0.5),
        Sampling(temperature=0.5): ({0, 1, 2, 3}, 0.25 / (probs**2).sum()),
        Sampling(top_k=2): ({0, 1}, 0.5 / 0.8),
        Sampling(top_k=9): ({0, 1, 2, 3}, 0.5),
        Sampling(top_p=0.7): ({0, 1}, 0.5 / 0.8),
        Sampling(top_p=0.85): ({0, 1, 2}, 0.5 / 0.95),
        Sampling(top_k=3, top_p=0.8): ({0, 1}, 0.5 / 0.8),
        Sampling(top_p=0.1): ({0}, 1.0),
        GREEDY: ({0}, 1.0),
    }
    for sampling, (tokens, first) in cases.items():
        drawn = np.asarray(sample(logits, keys, sampling))
        assert set(drawn) == tokens, sampling
        assert (drawn == 0).mean() == pytest.approx(first, abs=0.03), sampling


def test_sampling_out_of_range_and_prompts_that_do_not_fit_are_refused() -> None:
    for settings, sentence in (
        ({"temperature": -1.0}, r"temperature = -1.0 and top_k = 0 must not be negative"),
        ({"top_p": 0.0}, r"top_p = 0.0 must lie above 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Sampling(**settings)
    for texts, count, sentence in (
        (["ab", ""], 7, r"a prompt of 3 tokens and 7 more exceed model.length = 9"),
        (["ab"], 0, r"max_tokens = 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            encode_prompts(Bytes(), texts, count, dataclasses.replace(PLAIN, vocab_size=257))
    with pytest.raises(ValueError, match=rf"the tokenizer has 257 tokens, and model.vocab_size is {VOCABULARY}"):
        encode_prompts(Bytes(), ["a"], 1, PLAIN)
    assert encode_prompts(Few(), ["A", ""], 1, PLAIN) == [[-2, 65], [-2]]


def test_generation_ends_with_the_last_text() -> None:
    """Two prompts whose ends come apart: the first is shown its end until the other has come to it as well."""
    config = dataclasses.replace(PLAIN, length=LENGTH)
    plain = run(config, PROMPTS)
    later = next(n for n in range(NEW) if plain[1, n] not in plain[1, :n] and plain[1, n] in plain[0])
    tokenizer = Few()
    tokenizer.end = int(plain[1, later])
    model, variables = make_model(config, ONE_EACH, ROUTER), make_variables(config)
    steps = list(
        generate.generate(
            model, variables, PROMPTS[:2], NEW, sampling=GREEDY, seed=0, mesh=ONE_DEVICE, tokenizer=tokenizer
        )
    )
    ends = [list(row).index(tokenizer.end) for row in plain[:2]]
    assert len(steps) == max(ends) + 1
    for row in range(2):
        np.testing.assert_array_equal([s[row] for s in steps[: ends[row] + 1]], plain[row, : ends[row] + 1])
        assert all(s[row] == tokenizer.end for s in steps[ends[row] :])


def test_a_stream_waits_for_the_end_of_a_character(capsys: pytest.CaptureFixture[str]) -> None:
    written = []

    def steps() -> Iterator[np.ndarray]:
        for byte in "aé€".encode():
            yield np.array([byte, 65])
            written.append(capsys.readouterr().out)

    assert generate.write_stream(Bytes(), [66], steps()) == [list("aé€".encode()), [65] * 6]
    assert written == ["a", "", "é", "", "", "€"]


def fresh_model() -> Model:
    config = config_lib.resolve(ml_collections.ConfigDict(TABLE))
    return make_model(config.model, config.moe, config.router)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of no steps."""
    folder = tmp_path_factory.mktemp("lm")
    table = ml_collections.ConfigDict(TABLE)
    (folder / "config.json").write_text(config_lib.to_json(table))
    key = jax.random.key(0)
    variables, guard = fresh_model().init(key), init_guard(GuardConfig())
    state = train.TrainState(jnp.int32(7), variables, {"of": jnp.ones(3)}, guard, jax.random.key_data(key))
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(7, state, {})
    checkpoints.close()
    return folder


def run_generate(*argv: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.run(generate.main, list(argv))
    return int(exit_info.value.code or 0)


def test_the_program_continues_prompts(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each prompt with its continuation; the same again for the same seed; and mistakes in one sentence."""
    common = [f"--workdir={workdir}", "--max-tokens=5"]
    outputs = []
    for seed in (0, 0, 1):
        assert run_generate(*common, "--prompt=def", "--prompt=import os", f"--seed={seed}") == 0
        outputs.append(capsys.readouterr().out)
    first, second = outputs[0].split("\nimport os")
    assert first.startswith("def")
    assert len(second) > 1
    assert outputs[0] == outputs[1] != outputs[2]
    for argv, code, sentence in (
        (["--max-tokens=40", "--prompt=x"], cli.USAGE, "exceed model.length = 40"),
        (["--top-p=2", "--prompt=x"], cli.USAGE, "top_p = 2.0"),
        (["--step=8", "--prompt=x"], cli.FAILURE, "no checkpoint of step 8: there are 7"),
        ([], cli.USAGE, "--prompt"),
    ):
        assert run_generate(*common, *argv) == code
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert sentence in err


def test_a_loaded_model_has_the_checkpoint_s_weights(workdir: Path) -> None:
    """Sharded as the mesh says; a config with other shapes is one sentence."""
    loaded = load_model(workdir, None, ["mesh.fsdp=2", "mesh.expert=2", "mesh.data=2"])
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, fresh_model().init(jax.random.key(0)))
    assert loaded.variables.params["embedding"].addressable_shards[0].data.shape == (257, 8)
    with pytest.raises(Exception, match=r"doesn't fit the config: it has variables/params/.* \(.*16.*\).*32"):
        load_model(workdir, None, ["model.width=32", "mesh.data=8"])
