import pytest

from moe.data import source


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds the digits, prepared once for all tests."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    source.prepare("digits", folder)
    return folder


@pytest.fixture(scope="session")
def stdlib_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds the standard library's sources, prepared once for all tests."""
    folder = str(tmp_path_factory.mktemp("sources"))
    source.prepare("stdlib", folder)
    return folder
