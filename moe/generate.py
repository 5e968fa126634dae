"""Continues prompts with the language model of a training run.

    python -m moe.generate --workdir=runs/lm --prompt="def main(" [--prompt=… --max-tokens=256 --temperature=0.8 …]

Several prompts are continued together, each as if it were alone. The first appears as it is written, the others after.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from moe import cli
from moe.data.text import TextConfig
from moe.data.tokenizer import Tokenizer, open_tokenizer
from moe.files import open_path
from moe.models import LmConfig, Model, Variables
from moe.parallel.mesh import batch_shards
from moe.tasks import caution
from moe.workdir import load_model


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from softmax(logits / temperature).

    temperature: 0 takes the likeliest. top_k: of the k likeliest only; 0: of all. top_p: then of the fewest that have
    at least this probability together (nucleus sampling, 1904.09751). Tokens as likely as the last of these count too.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(f"temperature = {self.temperature} and top_k = {self.top_k} must not be negative.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie above 0 and not above 1.")


def sample(logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"], sampling: Sampling) -> Int[Array, "B"]:
    """A token for every row, by its own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        least_B1 = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        needed_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < sampling.top_p
        least_B1 = jnp.min(jnp.where(needed_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def make_decoder(model: Model, mesh: Mesh, sampling: Sampling, vocab_size: int) -> Callable[..., Any]:
    """The program of `generate`, which compiles once for each size of prompts and caches."""
    decode = model.method("decode")

    @functools.partial(jax.jit, donate_argnames="caches")
    def step(variables, tokens_BL, position_BL, mask_BL, caches, index, keys_B):  # type: ignore[no-untyped-def]
        logits_BV, caches = decode(variables, tokens_BL, position_BL, mask_BL, caches, mesh=mesh)
        keys_now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
        return sample(logits_BV[:, :vocab_size], keys_now_B, sampling), caches

    return step


def generate(
    model: Model,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    sampling: Sampling,
    seed: int,
    mesh: Mesh,
    tokenizer: Tokenizer,
    decoder: Callable[..., Any] | None = None,
    width: int = 0,
) -> Iterator[Int[np.ndarray, "B"]]:
    """Yields the next token of every prompt, `max_tokens` times or until all texts have ended; after its end, the end.

    Prompts may differ in length: each token's keys and values lie in the cache at the index of its position. A prompt's
    noise depends on the seed and its place among the prompts. Only tokens that the tokenizer has are drawn.
    decoder: what `make_decoder` made for the same model, mesh, sampling and tokenizer. width: at least so many tokens
    are made room for in front, so that prompts of many lengths run in one program.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    rows = -(-len(prompts) // batch_shards(mesh)) * batch_shards(mesh)
    width = max(width, int(lengths.max()))
    tokens_BL, mask_BL = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, : len(prompt)], mask_BL[row, : len(prompt)] = prompt, True
    position_BL = np.broadcast_to(np.arange(width, dtype=np.int32), tokens_BL.shape)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    step = decoder or make_decoder(model, mesh, sampling, tokenizer.vocab_size)
    caches = model.method("make_caches")(variables, rows, width + max_tokens)
    real_B = np.arange(rows) < len(prompts)
    next_B = np.zeros(rows, np.int32)
    next_B[real_B] = lengths
    ended_B = ~real_B
    for index in range(max_tokens):
        token_B, caches = step(variables, tokens_BL, position_BL, mask_BL, caches, index, keys_B)
        shown_B = np.where(ended_B, tokenizer.end, token_B)
        yield shown_B[real_B]
        ended_B = ended_B | (shown_B == tokenizer.end)
        if ended_B.all():
            return
        tokens_BL, position_BL, mask_BL = token_B[:, None], next_B[:, None], real_B[:, None]
        next_B = next_B + 1


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, config: LmConfig) -> list[list[int]]:
    """The prompts' tokens, behind the token that stands before every document.

    Raises ValueError where they don't fit the model, with what is to follow.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens} must be at least 1.")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and model.vocab_size is {config.vocab_size}: it isn't "
            "the one that the model was trained with."
        )
    prompts = [[tokenizer.begin, *(int(token) for token in tokenizer.encode(text))] for text in texts]
    longest = max(map(len, prompts))
    if longest + max_tokens > config.length:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_tokens} more exceed model.length = {config.length}: shorten the "
            "prompt, or choose a smaller --max-tokens."
        )
    return prompts


def write_stream(tokenizer: Tokenizer, first: list[int], steps: Iterator[Int[np.ndarray, "B"]]) -> list[list[int]]:
    """Writes the first row's text as it grows, after that of the tokens `first`; returns the new tokens of all rows."""
    new: list[list[int]] = []
    done = len(tokenizer.decode(first))
    for token_B in steps:
        new = new or [[] for _ in token_B]
        for tokens, token in zip(new, token_B, strict=True):
            tokens.append(int(token))
        text = tokenizer.decode(first + new[0])
        # A character whose last bytes are still to come would change.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[done:])
            sys.stdout.flush()
            done = len(text)
    sys.stdout.write(tokenizer.decode(first + new[0])[done:] + "\n")
    return new


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__ or "", "configs/digits.py")
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--prompt", action="append", required=True, help="text to go on from; may be given repeatedly")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many tokens only; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest of this probability together")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    arguments, overrides = cli.parse(parser, argv)
    with cli.usage_errors():
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
        loaded = load_model(open_path(arguments.workdir), arguments.step, overrides)
        if not isinstance(loaded.config.model, LmConfig) or not isinstance(loaded.config.data, TextConfig):
            raise ValueError(f"{arguments.workdir} holds a model of images, which writes no text.")
        if notice := caution(loaded.config.model, loaded.config.moe, loaded.config.router):
            raise ValueError(notice)
        tokenizer = open_tokenizer(loaded.config.data.tokenizer)
        prompts = encode_prompts(tokenizer, arguments.prompt, arguments.max_tokens, loaded.config.model)
    steps = generate(
        loaded.model,
        loaded.variables,
        prompts,
        arguments.max_tokens,
        sampling=sampling,
        seed=arguments.seed,
        mesh=loaded.mesh,
        tokenizer=tokenizer,
    )
    sys.stdout.write(arguments.prompt[0])
    new = write_stream(tokenizer, prompts[0], steps)
    for prompt, tokens in list(zip(prompts, new, strict=True))[1:]:
        print(f"\n{tokenizer.decode(prompt + tokens)}")


if __name__ == "__main__":
    cli.run(main)
