"""Which steps are recorded, and where the recording comes to lie."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from moe.profile import Profile, parse_steps


@pytest.mark.parametrize("text", ["10", "10:", ":15", "15:10", "0:3", "a:b", "1:2:3", "-1:3"])
def test_steps_are_first_and_last(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be FIRST:LAST, counted from 1, such as 10:15\.$"):
        parse_steps(text)
    assert parse_steps("10:15") == range(10, 16)
    assert parse_steps("7:7") == range(7, 8)


def recorded(folder: Path) -> list[Path]:
    return list(folder.glob("plugins/profile/*/*.xplane.pb"))


def test_the_steps_that_were_asked_for_are_recorded(tmp_path: Path) -> None:
    profile = Profile(parse_steps("2:3"), tmp_path)
    done = []
    for step in range(1, 5):
        profile.begin(step)
        done.append(profile.end(step, jnp.zeros(3) + step))
    assert done == [False, False, True, False]
    assert len(recorded(tmp_path)) == 1


def test_a_run_that_ends_before_keeps_what_there_is(tmp_path: Path) -> None:
    profile = Profile(parse_steps("2:9"), tmp_path)
    profile.begin(2)
    assert not profile.end(2, jnp.zeros(3))
    profile.close()
    assert len(recorded(tmp_path)) == 1


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    profile = Profile(range(0), tmp_path / "profile")
    profile.begin(1)
    assert not profile.end(1, None)
    profile.close()
    assert not (tmp_path / "profile").exists()
