"""Files that are written whole."""

from pathlib import Path

import pytest

from moe.files import write_whole


def test_a_file_that_can_not_be_written_is_the_one_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "page.html"
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(path, "text")
    assert caught.value.filename == str(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(IsADirectoryError) as caught_folder:
        write_whole(folder, "text")
    assert (caught_folder.value.filename, caught_folder.value.filename2) == (str(folder), None)
