"""Evaluates the language model of a training run by lm-evaluation-harness, through its own model interface.

    pip install 'moe-jax[lm-eval]'
    python -m moe.harness --workdir=runs/lm --tasks=sums --include-path=tasks [--num-fewshot=5 --limit=100 --step=N]

Tasks are those that the package has, most of which fetch their data, and those of YAML files in --include-path, whose
data may be local files. Results are printed and written to harness.json of the workdir.
"""

import contextlib
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe import cli
from moe.checkpoint import Checkpoints
from moe.data.text import TextConfig
from moe.data.tokenizer import Tokenizer, open_tokenizer
from moe.files import describe, open_path, write_whole
from moe.generate import Sampling, generate, make_decoder
from moe.models import LmConfig
from moe.parallel import hosts
from moe.parallel.mesh import batch_shards
from moe.tasks import caution
from moe.workdir import Loaded, load_model

try:
    from lm_eval.api.model import LM as _Interface
except ModuleNotFoundError:  # the methods work without it

    class _Interface:  # type: ignore[no-redef]
        """Stands in for lm_eval.api.model.LM."""


# Lengths are rounded up to multiples of it, so that few programs are compiled.
_STRIDE = 64
# What lm-eval asks for where a task says nothing.
_MAX_TOKENS = 256
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class Scored(NamedTuple):
    """Tokens that the model reads, the token after each, and of how many of these, the last ones, the loss counts."""

    tokens: list[int]
    targets: list[int]
    counted: int


class HarnessLM(_Interface):
    """A model as `lm_eval.simple_evaluate(model=…)` takes it, in one process, on any number of its devices.

    Every text stands alone in its row, behind the token that the tokenizer puts before documents, and is routed by
    itself; no token is dropped. Requests are anything with `args`, as lm_eval.api.instance.Instance is.
    """

    def __init__(self, loaded: Loaded, batch_size: int = 8, seed: int = 0) -> None:
        """seed: of sampling, where a task asks for it. Raises ValueError where the model isn't one of text."""
        super().__init__()
        if not isinstance(loaded.config.model, LmConfig) or not isinstance(loaded.config.data, TextConfig):
            raise ValueError("the harness asks for text, and this is a model of images.")
        if batch_size < 1:
            raise ValueError(f"--batch-size={batch_size} must be at least 1.")
        self._loaded, self._seed = loaded, seed
        self._length = loaded.config.model.length
        self._tokenizer: Tokenizer = open_tokenizer(loaded.config.data.tokenizer)
        shards = batch_shards(loaded.mesh)
        self._rows = -(-batch_size // shards) * shards
        self._score = jax.jit(functools.partial(loaded.model.score, mesh=loaded.mesh))
        self._decoders: dict[Sampling, Any] = {}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation) the log probability of the continuation in nats, and whether it is greedy.

        Greedy: every token of it is the likeliest. Of what the model can't read at once the beginning is left out,
        which is said. Raises ValueError where that would be a part of the continuation.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self._length:
            raise ValueError(
                f"a continuation of {longest} tokens exceeds model.length = {self._length}: leave this task out, or "
                "train a model that reads more."
            )
        cut = sum(len(context) + len(continuation) > self._length + 1 for context, continuation in pairs)
        self._say_cut(cut, len(pairs))
        windows = []
        for context, continuation in pairs:
            tokens = (context + continuation)[-(self._length + 1) :]
            windows.append(Scored(tokens[:-1], tokens[1:], len(continuation)))
        return self._log_probs(windows)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,) its log probability in nats, every token being predicted once.

        A text that the model can't read at once is cut into windows of its length: the first begins the document, the
        last reaches back so far as to be full, as lm_eval.utils.get_rolling_token_windows has it.
        """
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for window in self._windows(self._encode(request.args[0])):
                windows.append(window)
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._log_probs(windows), strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings) the text that follows, up to the first of the strings in `until`.

        settings: until, max_gen_toks (256), do_sample (False: the likeliest tokens), temperature, top_k, top_p. Raises
        ValueError for others. At most half of model.length is written, and of a context that then doesn't fit the
        beginning is left out; both are said.
        """
        asked = [self._settings(request.args[1]) for request in requests]
        prompts = [[self._tokenizer.begin, *self._encode(request.args[0])] for request in requests]
        shortened = {many: min(many, max(1, self._length // 2)) for _, _, many in asked}
        for many, few in shortened.items():
            if few < many:
                hosts.say(f"{few} tokens are written at most, not {many}: model.length is {self._length}", error=True)
        limits = [self._length - shortened[many] for _, _, many in asked]
        cut = sum(len(prompt) > limit for prompt, limit in zip(prompts, limits, strict=True))
        self._say_cut(cut, len(prompts))
        texts = [""] * len(requests)
        kinds: dict[tuple[Sampling, int], list[int]] = {}
        for index, (_, sampling, many) in enumerate(asked):
            prompts[index] = prompts[index][-limits[index] :]
            kinds.setdefault((sampling, shortened[many]), []).append(index)
        for (sampling, many), members in kinds.items():
            members.sort(key=lambda index: len(prompts[index]))
            for start in range(0, len(members), self._rows):
                batch = members[start : start + self._rows]
                until = [asked[index][0] for index in batch]
                found = self._continue([prompts[index] for index in batch], until, sampling, many)
                for index, text in zip(batch, found, strict=True):
                    texts[index] = text
        return texts

    def _continue(self, prompts: list[list[int]], until: list[list[str]], sampling: Sampling, many: int) -> list[str]:
        loaded, tokenizer = self._loaded, self._tokenizer
        if sampling not in self._decoders:
            self._decoders[sampling] = make_decoder(loaded.model, loaded.mesh, sampling, tokenizer.vocab_size)
        # As many rows in every batch, of which the last may repeat a prompt.
        rows = prompts + prompts[-1:] * (self._rows - len(prompts))
        width = min(_round_up(max(map(len, prompts))), self._length)
        steps = generate(
            loaded.model,
            loaded.variables,
            rows,
            many,
            sampling=sampling,
            seed=self._seed,
            mesh=loaded.mesh,
            tokenizer=tokenizer,
            decoder=self._decoders[sampling],
            width=width,
        )
        before = [len(tokenizer.decode(prompt)) for prompt in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        for token_B in steps:
            for row, prompt in enumerate(prompts):
                new[row].append(int(token_B[row]))
                texts[row] = tokenizer.decode(prompt + new[row])[before[row] :]
            if all(any(stop in text for stop in stops) for text, stops in zip(texts, until, strict=True)):
                break
        cuts = [
            min([text.find(stop) for stop in stops if stop in text], default=len(text))
            for text, stops in zip(texts, until, strict=True)
        ]
        return [text[:cut] for text, cut in zip(texts, cuts, strict=True)]

    def _settings(self, given: dict[str, Any]) -> tuple[list[str], Sampling, int]:
        """The strings that end a text, how tokens are drawn, and how many at most."""
        if unknown := sorted(given.keys() - _GENERATION):
            raise ValueError(f"generation settings {', '.join(unknown)} are unknown: there are {sorted(_GENERATION)}.")
        until = given.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        sampling = Sampling(temperature=0.0)
        if given.get("do_sample", False):
            sampling = Sampling(given.get("temperature", 1.0), given.get("top_k", 0), given.get("top_p", 1.0))
        return [stop for stop in stops if stop], sampling, int(given.get("max_gen_toks", _MAX_TOKENS))

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both are encoded together, and spaces at the end of the context count as the continuation's."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self._encode(stripped)
        after = self._encode(stripped + continuation)[len(before) :]
        return [self._tokenizer.begin, *before], after

    def _windows(self, tokens: list[int]) -> Iterator[Scored]:
        length = self._length
        whole = [self._tokenizer.begin, *tokens]
        done = 0
        while done < len(tokens):
            end = min(done + length, len(tokens))
            start = max(0, end - length)
            yield Scored(whole[start:end], whole[start + 1 : end + 1], end - done)
            done = end

    def _log_probs(self, windows: Sequence[Scored]) -> list[tuple[float, bool]]:
        """The log probability of what counts in each window, and whether all of that is the likeliest."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
        order = sorted(range(len(windows)), key=lambda index: -len(windows[index].tokens))
        for start in range(0, len(order), self._rows):
            batch = order[start : start + self._rows]
            length = min(_round_up(len(windows[batch[0]].tokens)), self._length)
            shape = (self._rows, length)
            arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment")}
            for row, index in enumerate(batch):
                size = len(windows[index].tokens)
                arrays["tokens"][row, :size], arrays["targets"][row, :size] = (
                    windows[index].tokens,
                    windows[index].targets,
                )
                arrays["segment"][row, :size] = 1
            position = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
            mask = np.arange(self._rows) < len(batch)
            scores = self._score(self._loaded.variables, {**arrays, "position": position, "mask": mask})
            nll, correct = np.asarray(scores.nll, np.float64), np.asarray(scores.correct)
            for row, index in enumerate(batch):
                size = len(windows[index].tokens)
                counted = slice(size - windows[index].counted, size)
                found[index] = (-float(nll[row, counted].sum()), bool(correct[row, counted].all()))
        return found

    def _say_cut(self, count: int, total: int) -> None:
        if count:
            hosts.say(f"the beginnings of {count} of {total} contexts don't fit in and are left out", error=True)


def _round_up(length: int) -> int:
    return -(-length // _STRIDE) * _STRIDE


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__ or "", "configs/digits.py")
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--tasks", required=True, help="names of tasks, with commas between")
    parser.add_argument("--include-path", help="folder of tasks of your own, in YAML")
    parser.add_argument("--num-fewshot", type=int, help="solved examples before each (default: the task's)")
    parser.add_argument("--limit", type=int, help="examples of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (default: %(default)s)")
    arguments, overrides = cli.parse(parser, argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise cli.UsageError("lm-evaluation-harness isn't installed: pip install 'moe-jax[lm-eval]'.")
    # Tasks may import a package called evaluate, and evaluate.py in this folder is none.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.getcwd()]
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = arguments.tasks.split(",")
    try:
        manager = TaskManager(include_path=arguments.include_path)
        missing = [name for name in names if not manager.match_tasks([name])]
        if not missing:
            manager.load(names)
    except Exception as error:  # as many kinds as there are mistakes in a YAML file, and ways not to find data
        raise cli.UsageError(f"tasks {arguments.tasks} can't be set up: {describe(error)}.") from error
    if missing:
        raise cli.UsageError(f"there is no task {', '.join(missing)}: give its folder as --include-path.")
    with cli.usage_errors():
        workdir = open_path(arguments.workdir)
        with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
            step = checkpoints.choose(arguments.step)
        loaded = load_model(workdir, step, [*overrides, "moe.evaluation_capacity_factor=0"])
        model = HarnessLM(loaded, arguments.batch_size)
        if notice := caution(loaded.config.model, loaded.config.moe, loaded.config.router):
            raise ValueError(notice)
        found = simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            log_samples=False,
        )
    results = found["results"]
    for name, measures in results.items():
        hosts.say(*(f"{name} {measure} {value}" for measure, value in measures.items() if measure != "alias"))
    write_whole(workdir / "harness.json", json.dumps({"step": step, "tasks": results}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    cli.run(main)
