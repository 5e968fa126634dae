"""What the shared steps of the routers refuse, and what they take for granted."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import Softmax
from moe.routers.base import given
from moe.types import Layout, RouterInputs


def test_a_group_without_a_layout_is_one_example_with_a_logit_per_expert() -> None:
    one = given(Softmax(k=2), RouterInputs(jnp.ones((6, 3), jnp.bfloat16)))
    assert (one.num_experts, one.num_examples, one.logits.dtype) == (3, 1, jnp.float32)
    np.testing.assert_array_equal(one.mask, np.ones(6, bool))


def test_logits_that_do_not_fit_the_experts_are_refused() -> None:
    inputs = RouterInputs(jnp.ones((6, 4)), layout=Layout(num_experts=3, num_examples=2))
    with pytest.raises(ValueError, match=r"wants 3 logits per token for 3 experts, not 4"):
        given(Softmax(k=2), inputs)
    with pytest.raises(ValueError, match=r"k = 2 .* 1\.\.1"):
        given(Softmax(k=2), RouterInputs(jnp.ones((6, 1))))


def test_examples_that_do_not_divide_the_tokens_are_refused() -> None:
    inputs = RouterInputs(jnp.ones((6, 3)), layout=Layout(num_experts=3, num_examples=4))
    with pytest.raises(ValueError, match=r"6 tokens can't be 4 examples"):
        given(Softmax(k=2), inputs)
