import pytest

from moe.data import source


@pytest.fixture(autouse=True)
def tokens_of_this_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test tokenises without naming a folder doesn't land in the repository."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("default")))


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
