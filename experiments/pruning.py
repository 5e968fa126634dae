"""Does training through a differentiable top-k in magnitude prune a network better than a hard one does?

    python -m experiments.pruning [--seeds=5] [--json FILE] [--markdown FILE]

Sander et al. 2023 (arXiv 2302.01425, "Weight pruning in neural networks") train an MLP whose every matrix of weights is
seen through sparse p-norm top-k in magnitude, p = 2 or 4/3, and find it better than through the hard one. Here an MLP
of 64, 128, 128 and 10 units on scikit-learn's digits, 1 437 to train on and 360 by other writers to test on, with 80,
90, 95 and 98 % of each matrix's weights zero; the rival is the hard top-k, whose gradient reaches the weights it keeps,
or all of them (straight-through, Bengio et al. 2013, arXiv 1308.3432), or comes only once, after dense training.

A sparse operator keeps at least k weights, so every network is tested with the hard one's k, without training after
that; how it did before stands beside it. "strength 30 to .001" falls geometrically over the run; as a large one keeps
more weights, there is a hard operator whose k falls from all weights to its own ("zeros rising"). Learning rate and
strengths were chosen by accuracy on the last 287 training scans, by models that had not seen these.

Two x86-64 cores shared with others, 5 minutes, 5 seeds: above the hard operator's own gradient; level with
straight-through at a constant strength; with one that falls, level with zeros that rise up to 95 %, and above these at
98 %. `experiments/results/pruning.md` has all figures.
"""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from experiments import common
from experiments.common import Examples, Sample
from moe import topk

WIDTHS = (64, 128, 128, 10)
ZEROS = (0.8, 0.9, 0.95, 0.98)
STEPS, BATCH, LEARNING_RATE = 1000, 128, 1e-2
HARD, STRAIGHT, DENSE = "hard", "hard, straight-through", "dense"
GRADUAL = "hard, straight-through, zeros rising"
Layers = list[tuple[jax.Array, jax.Array]]  # weights and biases
Pruner = Callable[[jax.Array, Any, jax.Array], jax.Array]


class Method(NamedTuple):
    """prune(weights, k, strength): the weights that the network sees. strengths: at the first step and the last."""

    prune: Pruner
    strengths: tuple[float, float] = (1.0, 1.0)


def hard(w: jax.Array, k: Any, strength: ArrayLike = 0.0) -> jax.Array:
    """The k largest weights; the others get no gradient."""
    del strength
    return topk.hard_magnitude(w, k)


def straight_through(w: jax.Array, k: Any, strength: ArrayLike = 0.0) -> jax.Array:
    """The k largest weights, with the gradient of all."""
    return w + jax.lax.stop_gradient(hard(w, k, strength) - w)


def straight_through_gradually(w: jax.Array, k: Any, strength: ArrayLike = 0.0) -> jax.Array:
    """As `straight_through`, with k (n/k)^strength weights."""
    more = jnp.round(k * (w.size / k) ** strength).astype(jnp.int32)
    return straight_through(w, more)


def dense(w: jax.Array, k: Any, strength: ArrayLike = 0.0) -> jax.Array:
    """All weights."""
    del k, strength
    return w


def sparse(p: float, first: float, last: float) -> Method:
    """Sparse p-norm top-k in magnitude."""
    return Method(lambda w, k, strength: topk.magnitude(w, k, strength=strength, p=p), (first, last))


METHODS = {
    DENSE: Method(dense),
    HARD: Method(hard),
    STRAIGHT: Method(straight_through),
    GRADUAL: Method(straight_through_gradually, (1.0, 0.001)),
    "sparse, p = 2, strength .01": sparse(2, 0.01, 0.01),
    "sparse, p = 2, strength 1": sparse(2, 1.0, 1.0),
    "sparse, p = 2, strength 30 to .001": sparse(2, 30.0, 0.001),
    "sparse, p = 4/3, strength .01": sparse(4 / 3, 0.01, 0.01),
    "sparse, p = 4/3, strength 1 to .001": sparse(4 / 3, 1.0, 0.001),
}


def kept(zeros: float, widths: Sequence[int] = WIDTHS) -> list[int]:
    """How many weights of each matrix are left."""
    return [max(1, round((1 - zeros) * a * b)) for a, b in itertools.pairwise(widths)]


def init(key: jax.Array) -> Layers:
    """Weights of variance 2 / fan-in (He et al. 2015), biases 0."""
    shapes = list(itertools.pairwise(WIDTHS))
    keys = jax.random.split(key, len(shapes))
    return [(jax.random.normal(k, s) * (2 / s[0]) ** 0.5, jnp.zeros(s[1])) for k, s in zip(keys, shapes, strict=True)]


def pruned(prune: Pruner, layers: Layers, counts: Any, strength: ArrayLike) -> Layers:
    """The layers as the network sees them: each matrix pruned by itself, biases whole."""
    strength = jnp.asarray(strength)
    return [(prune(w.reshape(-1), k, strength).reshape(w.shape), b) for (w, b), k in zip(layers, counts, strict=True)]


def logits(layers: Layers, x: jax.Array) -> jax.Array:
    """The MLP, with ReLU between its layers."""
    for w, b in layers[:-1]:
        x = jax.nn.relu(x @ w + b[None])
    w, b = layers[-1]
    return x @ w + b[None]


def loss(layers: Layers, method: Method, counts: Any, strength: jax.Array, examples: Examples) -> jax.Array:
    """Cross-entropy of the pruned network."""
    scores = logits(pruned(method.prune, layers, counts, strength), examples[0])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, examples[1]))


def train(method: Method, key: jax.Array, counts: Any, examples: Examples, steps: int) -> Layers:
    """Adam with a cosine schedule, from random weights; all of them stay, and may come back."""
    key_init, key_rows = jax.random.split(key)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    first, last = method.strengths

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        layers, state = carry
        rows = jax.random.randint(jax.random.fold_in(key_rows, index), (BATCH,), 0, len(examples[0]))
        strength = first * (last / first) ** (index / steps)
        gradient = jax.grad(loss)(layers, method, counts, strength, jax.tree.map(lambda x: x[rows], examples))
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(layers, updates), state), None

    layers = init(key_init)
    (layers, _), _ = jax.lax.scan(step, (layers, optimizer.init(layers)), jnp.arange(steps))
    return layers


def accuracy(layers: Layers, examples: Examples) -> jax.Array:
    """Share of right answers."""
    return jnp.mean(jnp.argmax(logits(layers, examples[0]), axis=-1) == examples[1])


def share_of_zeros(layers: Layers) -> jax.Array:
    """Of all weights of the matrices together."""
    weights = jnp.concatenate([w.reshape(-1) for w, _ in layers])
    return jnp.mean(weights == 0, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames=("name", "steps"))
def measure(name: str, keys: jax.Array, counts: jax.Array, fit: Examples, test: Examples, steps: int) -> Any:
    """By share of zeros and seed: accuracy with exactly k weights, accuracy and share of zeros as trained."""

    def run(key: jax.Array, counts: jax.Array) -> tuple[jax.Array, ...]:
        method = METHODS[name]
        layers = train(method, key, counts, fit, steps)
        seen = pruned(method.prune, layers, counts, method.strengths[1])
        return accuracy(pruned(hard, layers, counts, 0.0), test), accuracy(seen, test), share_of_zeros(seen)

    return jax.vmap(jax.vmap(run, (0, None)), (None, 0))(keys, counts)


def samples(
    seeds: int, steps: int = STEPS, zeros: Sequence[float] = ZEROS, names: Sequence[str] = tuple(METHODS)
) -> list[Sample]:
    """Trains every method for every share of zeros and seed."""
    fit, test = ((image.reshape(len(image), -1), label) for image, label in common.digits())
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    found = []
    for name in names:
        # Dense training is the same whatever is pruned after it.
        counts = jnp.array([kept(share) for share in zeros])
        exact, trained, share = jax.device_get(measure(name, keys, counts, fit, test, steps))
        if name == DENSE:
            found.append(Sample(DENSE, "no zeros", "accuracy", trained[0].tolist()))
        for index, wanted in enumerate(zeros):
            case = f"{100 * wanted:g} % zeros"
            label = "hard, after dense training" if name == DENSE else name
            found.append(Sample(label, case, "accuracy", exact[index].tolist()))
            if name.startswith("sparse"):
                found.append(Sample(name, case, "accuracy before the last pruning", trained[index].tolist()))
                found.append(Sample(name, case, "zeros before the last pruning", share[index].tolist()))
        print(f"{name}: done", flush=True)
    return sorted(found, key=lambda sample: (sample.unit, sample.case != "no zeros", sample.case))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = common.parser(__doc__)
    options.add_argument("--only", choices=METHODS, action="append", help="methods to run; all by default")
    arguments = common.parse(options, argv)
    begin = time.perf_counter()
    found = samples(arguments.seeds, names=arguments.only or list(METHODS))
    common.report(found, [STRAIGHT], arguments, "pruning", begin)


if __name__ == "__main__":
    main()
