"""What does pooling tokens between an encoder's layers by successive halving gain in time, and cost in quality?

    python -m experiments.pooling [--seeds=5] [--json FILE] [--markdown FILE]

Pietruszka, Borchmann and Graliński (AAAI 2021, arXiv 2010.15552) made the operator to pool the representations between
the layers of an encoder of long texts, as their arXiv 2009.05169 does: quality as without, at a fraction of the time.
Here an encoder of 3 blocks reads 256 bytes of source code and says which package of Python's standard library they are
from (those of at least 12 files and 200 kB; 11 in Python 3.11). Its files are split, so that no file is trained on and
tested on. Pooling leaves 128 and 64 tokens after the first two blocks. Besides halving, hard top-k with a gather
(rows times their scores, or else these would have no gradient), and the means of neighbours, which look at no scores.

Times are of the processor, all threads, of one training step (8 texts) and of one prediction; all methods in turn.

Two x86-64 cores shared with others, 35 minutes, 5 seeds: halving takes half the time and is .066 ± .013 (base 20) or
.036 ± .021 above no pooling after 1 000 steps, as good as means of neighbours; all are far from done with learning.
`experiments/results/pooling.md` has all figures.
"""

import functools
import hashlib
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.common import interleaved
from experiments import common
from experiments.common import Sample
from moe import topk
from moe.data.stdlib import source_names
from moe.layers.block import Block, BlocksConfig
from moe.layers.moe import MoeConfig
from moe.layers.param import matrix
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.routers.dense import Dense

FILES, BYTES, TESTED = 12, 200_000, 0.25  # of a package: at least so many; share of the files to test on
LENGTH, BATCH, TESTS = 256, 8, 48  # tests: texts of a package at most
STEPS, LEARNING_RATE, WEIGHT_DECAY = 1000, 2e-3, 0.05
CONFIG = BlocksConfig(width=64, depth=3, heads=2, mlp_width=128, moe_every=0)
WINDOW = 3  # bytes that make up a token's embedding: its own, and those before it
NONE = "no pooling"
Pool = Callable[[jax.Array, jax.Array, int], jax.Array]


def halving(weights: topk.PairWeights) -> Pool:
    """Successive halving."""
    return lambda rows, scores, k: topk.successive_halving(rows, scores, k, weights=weights).embeddings


def hard(rows: jax.Array, scores: jax.Array, k: int) -> jax.Array:
    """The k rows of the highest scores, times these."""
    best, index = jax.lax.top_k(scores, k)
    return jnp.take_along_axis(rows, index[..., None], axis=-2) * best[..., None]


def neighbours(rows: jax.Array, scores: jax.Array, k: int) -> jax.Array:
    """Means of n/k rows that follow each other."""
    del scores
    return jnp.mean(rows.reshape(rows.shape[0], k, -1, rows.shape[-1]), axis=2)


METHODS: dict[str, Pool | None] = {
    NONE: None,
    "halving, base 20": halving(topk.BoostedSoftmax(base=20.0)),
    "halving, CentredBoost": halving(topk.CentredBoost()),
    "hard top-k": hard,
    "means of neighbours": neighbours,
}


class Texts(NamedTuple):
    """The files to train on, by package, as one array of bytes each; texts to test on, and their packages."""

    train: list[np.ndarray]
    text: np.ndarray
    label: np.ndarray


def is_tested(name: str) -> bool:
    """Whether a file is tested on, by the hash of its name."""
    return hashlib.sha256(name.encode()).digest()[0] < 256 * TESTED


def read_texts(length: int = LENGTH, tests: int = TESTS) -> Texts:
    """The packages that are large enough, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    packages: dict[str, list[str]] = defaultdict(list)
    for name in source_names(root):
        packages[name.partition("/")[0]].append(name)
    train: list[np.ndarray] = []
    text: list[np.ndarray] = []
    label: list[int] = []
    for package in sorted(packages):
        files = {name: (root / name).read_bytes() for name in packages[package]}
        if len(files) < FILES or sum(map(len, files.values())) < BYTES:
            continue
        tested = [data for name, data in files.items() if is_tested(name)]
        # An even share of all that could be cut from the files.
        cuts = [data[i : i + length] for data in tested for i in range(0, len(data) - length, length)]
        cuts = [cuts[i] for i in np.linspace(0, len(cuts) - 1, min(tests, len(cuts)), dtype=int)]
        text += [np.frombuffer(cut, np.uint8) for cut in cuts]
        label += [len(train)] * len(cuts)
        kept = b"".join(data for name, data in files.items() if not is_tested(name))
        train.append(np.frombuffer(kept, np.uint8))
    return Texts(train, np.stack(text), np.array(label))


def draw(texts: Texts, seed: int, steps: int, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Batches of random texts for all steps: packages are equally likely, and so are the places in each."""
    rng = np.random.default_rng(seed)
    label = rng.integers(len(texts.train), size=(steps, BATCH))
    starts = (rng.random(label.shape) * np.vectorize(lambda i: len(texts.train[i]) - length)(label)).astype(int)
    cuts = [texts.train[i][s : s + length] for i, s in zip(label.flat, starts.flat, strict=True)]
    return np.stack(cuts).reshape(*label.shape, length), label


class Encoder(nnx.Module):
    """Bytes with those before them, learned positions, pre-norm blocks with pooling between, the mean, a linear head.

    A row's score is a sigmoid of a learned direction of it.
    """

    def __init__(self, pool: Pool | None, classes: int, length: int, config: BlocksConfig, *, key: jax.Array) -> None:
        self.pool = pool
        keys = jax.random.split(key, config.depth + 4)
        self.embedding = matrix(keys[-1], (WINDOW * 256, config.width), (None, "embed"), fan_in=WINDOW)
        self.position = matrix(keys[-2], (length, config.width), (None, "embed"), fan_in=4)
        self.blocks = nnx.List(Block(config, MoeConfig(), Dense(), has_experts=False, key=k) for k in keys[:-4])
        # All scores are 1/2 at first, as the zeros are.
        self.w_score = matrix(keys[-3], (config.depth - 1, config.width), (None, "embed"), fan_in=config.width)
        self.norm = nnx.LayerNorm(config.width, rngs=nnx.Rngs(keys[-4]))
        self.head = nnx.Linear(config.width, classes, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(keys[-4]))

    def __call__(self, text: jax.Array) -> jax.Array:
        """Logits of the packages, for bytes [B, L]."""
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        padded = jnp.pad(text.astype(jnp.int32), ((0, 0), (WINDOW - 1, 0)))
        windows = [padded[:, i : i + text.shape[1]] + 256 * i for i in range(WINDOW)]
        x = sum(self.embedding[...][window] for window in windows) + self.position[...][None]
        for index, block in enumerate(self.blocks):
            x, _, _ = block(x, None, mesh, None, None, None, None)
            if self.pool is not None and index + 1 < len(self.blocks):
                scores = jax.nn.sigmoid(jnp.einsum("BLD,D->BL", x, self.w_score[...][index]))
                x = self.pool(x, scores, x.shape[1] // 2)
        return self.head(jnp.mean(self.norm(x), axis=1))


class Programs(NamedTuple):
    """init(key) -> state. train(state, text, label) -> state. predict(state, text) -> logits."""

    init: Callable[..., Any]
    train: Callable[..., Any]
    predict: Callable[..., Any]


def programs(
    pool: Pool | None, classes: int, steps: int, length: int = LENGTH, config: BlocksConfig = CONFIG
) -> Programs:
    """AdamW with warm-up and a cosine schedule."""

    def build(key: jax.Array) -> Encoder:
        return Encoder(pool, classes, length, config, key=key)

    graph = nnx.split(nnx.eval_shape(build, jax.random.key(0)))[0]
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(1, steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=WEIGHT_DECAY))

    def init(key: jax.Array) -> Any:
        params = nnx.to_pure_dict(nnx.split(build(key))[1])
        return params, optimizer.init(params)

    def logits(params: Any, text: jax.Array) -> jax.Array:
        return nnx.merge(graph, nnx.State(params))(text)

    def loss(params: Any, text: jax.Array, label: jax.Array) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, text), label))

    def train(state: Any, text: jax.Array, label: jax.Array) -> Any:
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params, text, label), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return Programs(jax.jit(init), jax.jit(train), jax.jit(lambda state, text: logits(state[0], text)))


def accuracy(predict: Callable[..., Any], state: Any, texts: Texts) -> float:
    """Share of the tests that are said right."""
    parts = np.array_split(np.arange(len(texts.text)), -(-len(texts.text) // 64))
    right = [np.argmax(predict(state, texts.text[part]), axis=-1) == texts.label[part] for part in parts]
    return float(np.mean(np.concatenate(right)))


def times(built: Mapping[str, Programs], texts: Texts, case: str) -> list[Sample]:
    """Processor milliseconds of a step and of a prediction."""
    batch = tuple(array[0] for array in draw(texts, 0, 1, texts.text.shape[1]))
    states = {name: each.init(jax.random.key(0)) for name, each in built.items()}
    step = {name: functools.partial(each.train, states[name], *batch) for name, each in built.items()}
    predict = {name: functools.partial(each.predict, states[name], batch[0]) for name, each in built.items()}
    return [
        Sample(name, case, unit, [value])
        for unit, functions in (("ms of a training step", step), ("ms of a prediction", predict))
        for name, value in interleaved(functions, repeats=7, seconds=10.0, clock=time.process_time).items()
    ]


def samples(
    seeds: int, steps: int = STEPS, length: int = LENGTH, tests: int = TESTS, config: BlocksConfig = CONFIG
) -> list[Sample]:
    """Trains every method with every seed, and times them."""
    texts = read_texts(length, tests)
    case = f"{len(texts.train)} packages, {length} bytes"
    built = {name: programs(pool, len(texts.train), steps, length, config) for name, pool in METHODS.items()}
    measured = times(built, texts, case)
    values: dict[str, list[float]] = {name: [] for name in built}
    for seed in range(seeds):
        batches = draw(texts, seed, steps, length)
        for name, each in built.items():
            state = each.init(jax.random.key(seed))
            for text, label in zip(*batches, strict=True):
                state = each.train(state, text, label)
            values[name].append(accuracy(each.predict, state, texts))
            print(f"{name}, seed {seed}: {values[name][-1]:.3f}", flush=True)
    return [Sample(name, case, "accuracy", values[name]) for name in built if seeds] + measured


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = common.parser(__doc__)
    options.add_argument("--steps", type=int, default=STEPS, help="of each run (default: %(default)s)")
    options.add_argument("--length", type=int, default=LENGTH, help="bytes of a text (default: %(default)s)")
    options.add_argument("--only-times", action="store_true", help="train nothing")
    arguments = common.parse(options, argv)
    begin = time.perf_counter()
    seeds = 0 if arguments.only_times else arguments.seeds
    common.report(samples(seeds, arguments.steps, arguments.length), [NONE], arguments, "pooling", begin)


if __name__ == "__main__":
    main()
