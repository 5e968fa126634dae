import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moe.data import corpus, documents
from moe.data.documents import Source
from moe.data.tokenizer import TokenizerConfig


@pytest.fixture
def source(tmp_path):
    for i, text in enumerate(["one", "two\n", "", "three é"]):
        (tmp_path / f"{i}.txt").write_text(text)
    return Source("files", paths=(f"{tmp_path}/*.txt",), test_paths=(f"{tmp_path}/0.txt",))


def open_it(source, cache, split="train", with_sizes=False):
    return corpus.open_corpus(source, split, TokenizerConfig(), "", str(cache), with_sizes)


def texts(found):
    starts = found.starts.tolist()
    return [bytes(found.tokens[a + 1 : b].astype(np.uint8)) for a, b in itertools.pairwise(starts)]


def test_a_text_is_tokenised_once_and_mapped(source, tmp_path, monkeypatch, capsys):
    first = open_it(source, tmp_path / "cache", with_sizes=True)
    assert "tokenised files[train]: 3 documents, 15 bytes, 18 tokens, kept in" in capsys.readouterr().out
    assert texts(first) == [b"one", b"two\n", "three é".encode()]
    assert (first.tokens[first.starts[:-1]] == 256).all()
    assert (first.tokens.dtype, first.sizes.dtype) == (np.uint16, np.uint32)
    assert isinstance(first.tokens, np.memmap)
    monkeypatch.setattr(corpus, "_write", lambda *_: pytest.fail("tokenised again"))
    corpus._checked.cache_clear()
    again = open_it(source, tmp_path / "cache", with_sizes=True)
    assert texts(again) == texts(first)
    assert [again.name(i).rpartition("/")[2] for i in range(3)] == ["0.txt", "1.txt", "3.txt"]
    sent = pickle.dumps(again)
    assert len(sent) < 1000  # a worker process maps the same files
    assert texts(pickle.loads(sent)) == texts(first)


def test_what_changes_the_tokens_changes_the_folder(source, tmp_path):
    cache = tmp_path / "cache"
    found = [open_it(source, cache), open_it(source, cache, "test"), open_it(source, cache, with_sizes=True)]
    os.utime(tmp_path / "1.txt", (1, 1))
    found.append(open_it(source, cache))
    (tmp_path / "1.txt").write_text("longer")
    found.append(open_it(source, cache))
    assert len({each.folder for each in found}) == len(list(cache.iterdir())) == 5
    assert texts(found[1]) == [b"one"]
    assert texts(found[4]) == [b"one", b"longer", "three é".encode()]
    # The hash of the texts depends on them alone.
    sums = [each.meta["sha256"] for each in found]
    assert sums[0] == sums[2] == sums[3]
    assert len(set(sums)) == 3


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("cut", r"is damaged \(tokens does not have its 36 bytes\)"),
        ("change", r"is damaged \(tokens has changed\)"),
        ("lose", r"is damaged \(starts does not have its 32 bytes\)"),
        ("meta", r"has no meta.json that can be read"),
        ("foreign", r"is of other text"),
        ("empty", r"has no meta.json that can be read"),
    ],
)
def test_a_damaged_or_foreign_folder_is_made_anew_in_one_line(source, tmp_path, capsys, harm, said):
    expected = open_it(source, tmp_path / "cache")
    folder, written = Path(expected.folder), texts(expected)
    tokens = folder / "tokens"
    content = bytearray(tokens.read_bytes())
    if harm == "cut":
        tokens.write_bytes(content[:-1])
    elif harm == "change":
        content[2] ^= 1
        tokens.write_bytes(content)
    elif harm == "lose":
        (folder / "starts").unlink()
    elif harm == "meta":
        (folder / "meta.json").write_text("{")
    elif harm == "foreign":
        other = Path(open_it(source, tmp_path / "cache", "test").folder)
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    corpus._checked.cache_clear()
    capsys.readouterr()
    assert texts(open_it(source, tmp_path / "cache")) == written
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(str(folder))
    assert re.search(said + r": tokenising files\[train\] again$", first)
    assert rest[0].startswith("tokenised files[train]")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


# Tokenises the files of argv[1] into argv[2], and stops for long before the folder gets its name.
SLOW = """
import sys, time
from moe.data import corpus, documents, tokenizer
corpus._put = lambda *arguments: time.sleep(600)
source = documents.Source("files", paths=(sys.argv[1],), test_paths=(sys.argv[1],))
corpus.open_corpus(source, "train", tokenizer.TokenizerConfig(), "", sys.argv[2], False)
"""


def test_a_start_after_a_kill_leaves_nothing_half_written(source, tmp_path, capsys):
    cache = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-c", SLOW, source.paths[0], str(cache)])
    while process.poll() is None and not list(cache.glob(".*/meta.json")):
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (left,) = cache.iterdir()
    alive = cache / f".other.{corpus.socket.gethostname()}.{os.getppid()}"
    alive.mkdir()
    assert texts(open_it(source, cache)) == [b"one", b"two\n", "three é".encode()]
    assert f"removed {left}, which a process that was killed left behind" in capsys.readouterr().out
    assert sorted(path.name[0] for path in cache.iterdir()) == [".", "f"]
    assert alive.is_dir()


def test_what_fails_leaves_nothing_behind(source, tmp_path):
    (tmp_path / "3.txt").write_bytes(b"{")
    broken = Source("files", paths=(f"{tmp_path}/3.txt",), test_paths=(f"{tmp_path}/3.txt",), format="jsonl")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        open_it(broken, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot keep the tokens of files\[train\] under .*: set data.cache_dir"):
        open_it(source, tmp_path / "file" / "cache")


def test_another_process_that_was_faster_wins(source, tmp_path, monkeypatch):
    tokenise = corpus._tokenise

    def overtaken(folder, *rest):
        monkeypatch.setattr(corpus, "_tokenise", tokenise)
        open_it(source, tmp_path / "cache")
        folder.mkdir(exist_ok=True)  # this process has the other's number here
        return tokenise(folder, *rest)

    monkeypatch.setattr(corpus, "_tokenise", overtaken)
    assert texts(open_it(source, tmp_path / "cache")) == [b"one", b"two\n", "three é".encode()]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_documents_without_text_are_counted_and_said(tmp_path, capsys):
    lines = [json.dumps({"text": text}) for text in ["a", "", "b", "", "", "", "c"]]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    for name in "yz":
        (tmp_path / f"{name}.jsonl").touch()
    everything = (f"{tmp_path}/*.jsonl",)
    found = open_it(Source("files", paths=everything, test_paths=everything, format="jsonl"), tmp_path / "cache")
    assert texts(found) == [b"a", b"b", b"c"]
    assert [found.name(i).rpartition(", ")[2] for i in range(3)] == ["line 1", "line 3", "line 7"]
    out = capsys.readouterr().out
    assert f"files[train]: 2 empty files ({tmp_path}/y.jsonl, {tmp_path}/z.jsonl) left out\n" in out
    assert f"files[train]: 4 documents ({tmp_path}/x.jsonl, line 2, {tmp_path}/x.jsonl, line 4, " in out
    assert ", …) without text left out\n" in out


@pytest.mark.parametrize(
    "text", [b"ab\ncd\nefgh", b"abcdefghij", "ééééééé".encode(), b"\x80" * 9, b"abcd\nefg", b"abcd"]
)
def test_long_files_are_read_in_pieces(tmp_path, monkeypatch, text):
    monkeypatch.setattr(documents, "_BLOCK", 4)
    (tmp_path / "x").write_bytes(text)
    pieces = list(documents._pieces(str(tmp_path / "x")))
    assert b"".join(pieces) == text
    assert max(map(len, pieces)) <= 8
    if text.isascii() and b"\n" in text[:4]:
        assert pieces[0].endswith(b"\n")
    if b"\x80" not in text:
        assert "".join(piece.decode() for piece in pieces) == text.decode()
    only = (str(tmp_path / "x"),)
    found = open_it(Source("files", paths=only, test_paths=only), tmp_path / "cache", with_sizes=True)
    assert texts(found) == [text]
    assert found.sizes.sum() == len(text)
    assert found.documents[:, :2].tolist() == [[len(text), 0]]
