"""The config tables: of the routers, and that every field can be set on the command line."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from moe import config as config_lib
from moe.routers import ROUTERS

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = CONFIGS / "digits.py"


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


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_has_every_field(path: Path) -> None:
    table = config_lib.load_file(str(path))
    assert list(missing(config_lib.resolve(table), table.to_dict(), "")) == []


def missing(value: Any, table: Mapping[str, Any], path: str) -> Iterator[str]:
    """The fields of a dataclass that its table lacks; of the options of a choice those of the chosen one."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if field.name not in table:
            yield f"{path}{field.name}"
        elif dataclasses.is_dataclass(inner):
            entry = table[field.name]
            yield from missing(inner, entry | entry.get(entry.get("name"), {}), f"{path}{field.name}.")
