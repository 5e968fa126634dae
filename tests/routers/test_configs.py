"""The config tables of the routers."""

import dataclasses
from pathlib import Path

import ml_collections
import pytest

from moe import config as config_lib
from moe.routers import ROUTERS

DIGITS = Path(__file__).parents[2] / "configs" / "digits.py"


def digits(*overrides: str) -> ml_collections.ConfigDict:
    table = config_lib.load_file(str(DIGITS))
    config_lib.override(table, overrides)
    return table


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_has_a_table_of_all_its_fields(name: str) -> None:
    """So that each can be set on the command line, on top of the k that most of them share."""
    table = digits(f"router.name={name}")
    fields = {field.name for field in dataclasses.fields(ROUTERS[name])}
    assert set(table.router[name]) == fields - {"k"}
    router = config_lib.resolve(table).router
    assert type(router) is ROUTERS[name]
    assert router.k in (None, 2)


def test_a_field_that_no_router_has_is_refused_beside_their_names() -> None:
    table = digits()
    with table.unlocked():
        table.router.kk = 3
    with pytest.raises(ValueError, match=r"router\.kk.*did you mean 'k'"):
        config_lib.resolve(table)
