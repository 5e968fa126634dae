"""Sorting and selection by networks of comparators: a fixed sequence of max/min pairs, no indices and no branches.

Odd-even merging (Batcher 1968, "Sorting networks and their applications"; Knuth, TAOCP 3, 5.3.4) of lists of any
lengths. For the k-th largest value, only the first k+1 of every merged list go on, and comparators that order entries
which nobody looks at are left out: 75 in place of 191 comparators for n = 32, k = 2.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Network(NamedTuple):
    """comparators: (i, j) leaves the larger value on wire i. order: wires by rank, as far as the network ranks them."""

    comparators: tuple[tuple[int, int], ...]
    order: tuple[int, ...]

    def apply(self, values: Sequence[Float[Array, "..."]]) -> list[Float[Array, "..."]]:
        """The values in the network's order. A NaN reaches every wire whose rank it could have decided."""
        wires = list(values)
        for i, j in self.comparators:
            wires[i], wires[j] = jnp.maximum(wires[i], wires[j]), jnp.minimum(wires[i], wires[j])
        return [wires[i] for i in self.order]

    def layers(self) -> list[list[tuple[int, int]]]:
        """The comparators in groups that share no wire, each after all that it depends on."""
        grouped: list[list[tuple[int, int]]] = []
        depth = dict.fromkeys(range(len(self.order)), 0)
        for i, j in self.comparators:
            layer = max(depth[i], depth[j])
            depth[i] = depth[j] = layer + 1
            grouped += [[]] if layer == len(grouped) else []
            grouped[layer].append((i, j))
        return grouped


@functools.cache
def sort(n: int) -> Network:
    """All n values in descending order."""
    comparators: list[tuple[int, int]] = []
    order = _rank(list(range(n)), n, comparators)
    return Network(tuple(comparators), tuple(order))


@functools.cache
def select(n: int, k: int) -> Network:
    """The k largest, of which the k-th is the last, then the (k+1)-th, then all others; otherwise in any order."""
    comparators: list[tuple[int, int]] = []
    ranked = _rank(list(range(n)), k + 1, comparators)
    group = dict.fromkeys(range(n), "rest")
    group.update(dict.fromkeys(ranked[:k], "largest"))
    group.update(zip(ranked[k - 1 :], ("k-th", "next"), strict=False))
    kept: list[tuple[int, int]] = []
    needed: set[int] = set()
    for i, j in reversed(comparators):
        if group[i] != group[j] or i in needed or j in needed:
            needed.update((i, j))
            kept.append((i, j))
    rest = [wire for wire in range(n) if wire not in ranked]
    return Network(tuple(reversed(kept)), tuple(ranked + rest))


def _rank(wires: list[int], most: int, comparators: list[tuple[int, int]]) -> list[int]:
    """Append comparators that sort the wires; return the `most` largest in descending order."""
    if len(wires) == 1:
        return wires
    half = (len(wires) + 1) // 2
    upper, lower = (_rank(part, most, comparators) for part in (wires[:half], wires[half:]))
    return _merge(upper, lower, comparators)[:most]


def _merge(a: list[int], b: list[int], comparators: list[tuple[int, int]]) -> list[int]:
    """Append comparators that merge two descending lists: first ranks of odd and of even place, then neighbours."""
    if not a or not b:
        return a + b
    if len(a) == len(b) == 1:
        comparators.append((a[0], b[0]))
        return a + b
    first, second = _merge(a[::2], b[::2], comparators), _merge(a[1::2], b[1::2], comparators)
    merged = first[:1]
    for i, wire in enumerate(second):
        if i + 1 < len(first):
            comparators.append((wire, first[i + 1]))
            merged += [wire, first[i + 1]]
        else:
            merged.append(wire)
    return merged + first[len(second) + 1 :]
