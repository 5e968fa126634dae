"""Text whose files are damaged: reading stops and says where, or leaves those documents out and says so."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from moe import tasks
from moe.data import corpus, documents
from moe.data.documents import Source
from moe.data.text import TextConfig, inspect_text, make_text_eval_batches, make_text_train_iterator
from moe.data.tokenizer import TokenizerConfig
from tests.data import damage
from tests.data.test_tokenizer import byte_level

LINES = [
    b'{"text": "a"}',
    b'{"te',
    b'{"text": "b"}',
    b'{"body": "c"}',
    b'{"text": "\xff"}',
    b"[" * 100_000,
    b'{"text": "d"}',
]
BYTES = TokenizerConfig()


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(LINES))
    return Source("files", paths=(str(path),), test_paths=(str(path),), format="jsonl", corrupt="skip")


def open_it(source, cache, tokenizer=BYTES, with_sizes=False, data_dir=""):
    return corpus.open_corpus(source, "train", tokenizer, data_dir, str(cache), with_sizes)


def texts(found):
    starts = found.starts.tolist()
    return [bytes(found.tokens[a + 1 : b].astype(np.uint8)) for a, b in itertools.pairwise(starts)]


def test_lines_that_cant_be_read_are_left_out_counted_and_named(lines, tmp_path, capsys):
    found = open_it(lines, tmp_path / "cache")
    assert texts(found) == [b"a", b"b", b"d"]
    assert [found.name(i).rpartition(", ")[2] for i in range(3)] == ["line 1", "line 3", "line 7"]
    path = lines.paths[0]
    note = (
        f"files[train]: 4 documents ({path}, line 2, {path}, line 4, {path}, line 5, …) that can't be read left out; "
        f"the first: {path}, line 2 is not JSON ("
    )
    assert note in capsys.readouterr().out
    corpus._checked.cache_clear()
    open_it(lines, tmp_path / "cache")
    assert note in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"te', r"line 2 is not JSON"),
        (b"[" * 100_000, r"line 2 is not JSON \("),
        (b'{"text": "\xff"}', r"line 2: byte 24 of the file is not UTF-8"),
        (b'{"text": 1}', r"line 2 has no text in field 'text'"),
    ],
)
def test_a_line_that_cant_be_read_stops_and_says_how_to_go_on(lines, tmp_path, line, said):
    Path(lines.paths[0]).write_bytes(LINES[0] + b"\n" + line + b"\n" + LINES[2])
    stopping = dataclasses.replace(lines, corrupt="stop")
    with pytest.raises(ValueError, match=rf"x.jsonl, {said}.*\(data.corrupt=skip leaves such documents out\)"):
        open_it(stopping, tmp_path / "cache")
    assert texts(open_it(lines, tmp_path / "cache")) == [b"a", b"b"]
    with pytest.raises(ValueError, match="line 2"):  # what was skipped once is none the better for it
        open_it(stopping, tmp_path / "cache")


def test_a_text_that_isnt_utf8_leaves_no_part_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "_BLOCK", 4)
    byte_level(tmp_path / "t.json")
    tokenizer = TokenizerConfig("huggingface", str(tmp_path / "t.json"))
    for name, text in [("a", b"one two"), ("b", b"abc\nefg\nij\xff\nkl"), ("c", b"three")]:
        (tmp_path / f"{name}.txt").write_bytes(text)
    source = Source("files", paths=(f"{tmp_path}/[abc].txt",), test_paths=(f"{tmp_path}/[abc].txt",))
    sound = dataclasses.replace(source, paths=(f"{tmp_path}/[ac].txt",))
    with pytest.raises(ValueError, match=r"b.txt: byte 10 is not UTF-8"):
        open_it(source, tmp_path / "cache", tokenizer, True)
    found = open_it(dataclasses.replace(source, corrupt="skip"), tmp_path / "cache", tokenizer, True)
    expected = open_it(sound, tmp_path / "cache", tokenizer, True)
    for name in ("tokens", "sizes", "starts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.meta["sha256"] == expected.meta["sha256"]
    assert [Path(found.name(i)).name for i in range(2)] == ["a.txt", "c.txt"]
    assert re.search(
        r"1 document \(.*b.txt\) that can't be read left out; .*byte 10 is not UTF-8", capsys.readouterr().out
    )


@pytest.fixture
def rows(tmp_path):
    """300 rows, in groups of 100, with checksums."""
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": [f"row number {i}" for i in range(1, 301)]})
    parquet.write_table(
        table, path, row_group_size=100, write_page_checksum=True, use_dictionary=False, compression="none"
    )
    return Source("files", paths=(str(path),), test_paths=(str(path),), format="parquet", corrupt="skip")


def test_a_flipped_byte_in_parquet_costs_the_rest_of_its_group(rows, tmp_path, capsys):
    path = Path(rows.paths[0])
    content = bytearray(path.read_bytes())
    content[content.index(b"row number 150")] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"x.parquet is damaged \(.*\): its rows 101 to 200 can't be read; write .*=skip"
    ):
        open_it(dataclasses.replace(rows, corrupt="stop"), tmp_path / "cache")
    found = open_it(rows, tmp_path / "cache")
    assert texts(found) == [f"row number {i}".encode() for i in [*range(1, 101), *range(201, 301)]]
    assert [found.name(i).rpartition(", ")[2] for i in (99, 100)] == ["row 100", "row 201"]
    assert "100 documents (" in capsys.readouterr().out


def test_no_flipped_byte_in_parquet_with_checksums_gives_another_text(rows, tmp_path):
    path = Path(rows.paths[0])
    content = path.read_bytes()
    body = int(np.frombuffer(content[-8:-4], np.uint32).item())  # of the footer, which has no checksum
    expected = {f"row number {i}".encode() for i in range(1, 301)}
    for place in range(4, len(content) - body - 8, 251):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        found = list(documents.open_documents(rows, "train", "").read())
        assert len(found) == 300
        sound = [text for one in found if not isinstance(one.pieces, documents.Damage) for text in one.pieces]
        assert set(sound) <= expected
        assert len(sound) in (200, 300)


@pytest.mark.parametrize("cut", [0.0, 0.5, 0.9])
def test_a_parquet_file_cut_short_is_left_out_whole(rows, tmp_path, cut, capsys):
    whole = tmp_path / "y.parquet"
    path = Path(rows.paths[0])
    whole.write_bytes(path.read_bytes())
    damage.truncate(path, int(cut * path.stat().st_size) + 1)
    both = dataclasses.replace(rows, paths=(str(path), str(whole)))
    with pytest.raises(ValueError, match=r"file .*x.parquet is not Parquet or damaged"):
        open_it(dataclasses.replace(both, corrupt="stop"), tmp_path / "cache")
    assert len(texts(open_it(both, tmp_path / "cache"))) == 300
    assert f"files[train]: 1 document ({path}) that can't be read left out; the first: file" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"has no text, as 1 document \(.*x.parquet\) can't be read \(file .*\): name other"
    ):
        open_it(rows, tmp_path / "cache")


def test_a_set_with_a_flipped_byte(stdlib_dir, tmp_path, capsys):
    folder = damage.copy(stdlib_dir, tmp_path / "sets")
    path = damage.shard(folder, "test")
    before = damage.records(path)
    damage.write(path, before)
    # A long one may have a block's header of the file in its midst.
    place = next(place for place, one in enumerate(before) if place > 5 and len(one) > 500 and one in path.read_bytes())
    damage.flip(path, place, at=100)
    config = TextConfig(data_dir=folder, threads=0)
    message = (
        rf"the example at index {place} of stdlib/.*\[test\] can't be used \(.*hash mismatch.*\): it is record {place} "
        r"of .*stdlib-test.array_record-00000-of-00001; prepare the set again \(data.corrupt=skip leaves"
    )
    with pytest.raises(ValueError, match=message):
        make_text_eval_batches(config, "test", 4)
    skipping = dataclasses.replace(config, corrupt="skip")
    counts = [
        max(batch["document"].max() for batch in make_text_eval_batches(one, "test", 512))
        for one in (skipping, dataclasses.replace(skipping, data_dir=stdlib_dir))
    ]
    assert counts[0] == counts[1] - 1
    assert re.search(rf"1 document \(stdlib/.*\[test\], example {place}\) that can't be read", capsys.readouterr().out)


def test_batches_without_damaged_lines_are_the_same_on_two_hosts_and_after_a_resume(lines):
    config = TextConfig(
        name="files", paths=lines.paths, test_paths=lines.paths, format="jsonl", length=2, corrupt="skip"
    )
    one = make_text_train_iterator(dataclasses.replace(config, threads=0), 2, 0)
    two = [make_text_train_iterator(config, 2, 0, host, 2) for host in range(2)]
    for step in range(4):
        if step == 2:
            for iterator in two:
                iterator.set_state(json.loads(json.dumps(one.get_state())))
        batch, parts = next(one), [next(iterator) for iterator in two]
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)
    assert one.get_state() == {"examples": 8, "skipped": 0}
    for iterator in two:
        iterator.close()


def test_fewer_rows_than_a_batch_are_said_and_than_processes_refused(lines):
    config = TextConfig(
        name="files", paths=lines.paths, test_paths=lines.paths, format="jsonl", length=2, corrupt="skip"
    )
    assert inspect_text(config).train_examples == 3
    assert tasks.shortage(config, 3, 1) == ""
    assert "has 3 rows of 2 tokens, fewer than a batch of 8: every" in tasks.shortage(config, 8, 1)
    with pytest.raises(
        ValueError, match=r"has 3 rows of 2 tokens, fewer than the 4 processes of this run: choose more"
    ):
        tasks.shortage(config, 8, 4)
