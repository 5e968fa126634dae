import dataclasses
import itertools
import json

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
import tokenizers
from pyarrow import parquet

from moe.data import source
from moe.data.generated import GeneratedInfo
from moe.data.stdlib import held_out
from moe.data.text import (
    TextConfig,
    check_vocabulary,
    inspect_text,
    make_text_eval_batches,
    make_text_train_iterator,
    name_document,
)
from moe.data.tokenizer import TokenizerConfig, open_tokenizer

END = 256
# 13 texts, ASCII and not, shorter and longer than a row of 8, each of its own letter.
DOCUMENTS = [
    (chr(97 + i) if i % 3 else chr(945 + i)) * size
    for i, size in enumerate([1, 3, 20, 7, 8, 9, 30, 2, 5, 16, 15, 4, 1])
]


@pytest.fixture
def config(tmp_path):
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / f"{i:02}.txt").write_text(document)
    (tmp_path / "test").mkdir()
    for i, document in enumerate(DOCUMENTS[:5]):
        (tmp_path / "test" / f"{i}").write_text(document)
    patterns = {"paths": (f"{tmp_path}/*.txt",), "test_paths": (f"{tmp_path}/test/*",)}
    return TextConfig(name="files", length=8, threads=0, **patterns)


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)


def pack(documents, length):
    """Rows by the book: an end before every document, the stream cut, one token more as the last target."""
    stream, owner, place = [], [], []
    for number, document in enumerate(documents):
        own = [END, *document.encode()]
        stream += own
        owner += [number] * len(own)
        place += range(len(own))
    rows = []
    for start in range(0, len(stream), length):
        kept = range(start, min(start + length, len(stream)))
        fill = [0] * (length - len(kept))
        follows = [*stream, END]
        rows.append({
            "source": 0,
            "document": [owner[i] for i in kept] + [-1] * len(fill),
            "tokens": [stream[i] for i in kept] + fill,
            "targets": [follows[i + 1] for i in kept] + fill,
            "segment": [owner[i] - owner[start] + 1 for i in kept] + fill,
            "position": [min(place[i], i - start) for i in kept] + fill,
            "loss_mask": [True] * len(kept) + [False] * len(fill),
        })  # fmt: skip
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


ROWS = len(pack(DOCUMENTS, 8)["tokens"])


def test_rows_in_stored_order_are_the_documents_end_to_end(config):
    ordered = dataclasses.replace(config, shuffle=False)
    epochs = take(make_text_train_iterator(ordered, ROWS, 0, 0, 1), 2)
    expected = pack(DOCUMENTS, 8) | {"index": np.arange(ROWS)}
    assert_same(epochs, {key: np.concatenate([value, value]) for key, value in expected.items()})
    dtypes = {key: value.dtype.name for key, value in epochs.items()}
    assert dtypes == dict.fromkeys(expected, "int32") | {"loss_mask": "bool"}


def test_every_epoch_has_another_order_of_documents_and_of_rows(config):
    orders = []
    for seed in (0, 1):
        epochs = take(make_text_train_iterator(config, ROWS, seed, 0, 1), 2)
        for rows in (slice(0, ROWS), slice(ROWS, 2 * ROWS)):
            epoch = {key: value[rows] for key, value in epochs.items()}
            index = epoch.pop("index")
            assert sorted(index) != index.tolist()
            back = np.argsort(index)
            np.testing.assert_array_equal(index[back], np.arange(ROWS))
            stream = epoch["tokens"][back][epoch["loss_mask"][back]]
            documents = bytes(1 if token == END else token for token in stream).decode().split("\1")[1:]
            assert sorted(documents) == sorted(DOCUMENTS)
            laid = pack(documents, 8)
            order = np.array([DOCUMENTS.index(each) if each != "a" else 0 for each in documents] + [-1])
            laid["document"] = order[laid["document"]]
            assert_same({key: value[back] for key, value in epoch.items()}, laid)
            orders.append((tuple(documents), tuple(index)))
    assert len({documents for documents, _ in orders}) == len({rows for _, rows in orders}) == 4


def test_a_run_goes_on_on_another_number_of_hosts(config):
    """One host, then two, then four, each from what one of the hosts before had saved."""
    whole = take(make_text_train_iterator(config, 12, 3, 0, 1), 6)
    state, start = {"examples": 0}, 0
    for hosts in (1, 2, 4):
        several = [make_text_train_iterator(config, 12, 3, host, hosts) for host in range(hosts)]
        for iterator in several:
            iterator.set_state(json.loads(json.dumps(state)))
        for _ in range(2):
            parts = [next(iterator) for iterator in several]
            batch = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            assert_same(batch, {key: value[start : start + 12] for key, value in whole.items()})
            start += 12
        state = several[-1].get_state()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_the_batches_of_one_from_any_state(config, hosts):
    whole = take(make_text_train_iterator(config, 12, 3, 0, 1), 6)
    for consumed in (0, 24):
        several = [make_text_train_iterator(config, 12, 3, host, hosts) for host in range(hosts)]
        for iterator in several:
            iterator.set_state({"examples": consumed})
        for start in range(consumed, 72, 12):
            parts = [next(iterator) for iterator in several]
            batch = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            assert_same(batch, {key: value[start : start + 12] for key, value in whole.items()})
        assert several[0].get_state() == {"examples": 72, "skipped": 0}


def test_threads_and_another_batch_size_go_on_where_the_state_says(config):
    whole = take(make_text_train_iterator(config, 12, 3, 0, 1), 6)
    threads = dataclasses.replace(config, threads=3, prefetch=5)
    saved = make_text_train_iterator(threads, 12, 3, 0, 1)
    next(saved)
    resumed = make_text_train_iterator(threads, 10, 3, 0, 1)
    resumed.set_state(json.loads(json.dumps(saved.get_state())))
    assert_same(take(resumed, 6), {key: value[12:] for key, value in whole.items()})


@pytest.mark.nightly
def test_worker_processes_read_the_same(config):
    whole = take(make_text_train_iterator(config, 12, 3, 0, 1), 4)
    workers = make_text_train_iterator(dataclasses.replace(config, workers=2, threads=1), 12, 3, 0, 1)
    assert_same(take(workers, 4), whole)
    workers.close()


def test_a_mixture_reads_each_source_by_its_weight(config, tmp_path):
    names = [f"files:{tmp_path}/00.txt", f"files:{tmp_path}/02.txt", f"files:{tmp_path}/0[3-9].txt"]
    mixed = dataclasses.replace(config, mixture=((names[0], 1), (names[1], 5.0), (names[2], 2)))
    batch = take(make_text_train_iterator(mixed, 8, 0, 0, 1), 10)
    of_first = (batch["tokens"] == "α".encode()[1]).any(axis=1)
    of_second = ((batch["tokens"] == ord("c")) | (batch["targets"] == ord("c"))).any(axis=1)
    assert (of_first.sum(), of_second.sum()) == (10, 50)
    alone = take(make_text_train_iterator(dataclasses.replace(config, name=names[0]), 1, 0, 0, 1), 10)
    np.testing.assert_array_equal(batch["source"], np.where(of_first, 0, np.where(of_second, 1, 2)))
    assert_same({key: value[of_first] for key, value in batch.items()}, alone)
    parts = [make_text_train_iterator(mixed, 8, 0, host, 2) for host in range(2)]
    first, second = (take(part, 10) for part in parts)
    np.testing.assert_array_equal(batch["tokens"].reshape(10, 2, 4, 8)[:, 1], second["tokens"].reshape(10, 4, 8))
    np.testing.assert_array_equal(batch["tokens"].reshape(10, 2, 4, 8)[:, 0], first["tokens"].reshape(10, 4, 8))
    assert inspect_text(mixed).train_documents == 2 + sum(not held_out(each.encode()) for each in DOCUMENTS[3:10])


def test_begin_and_end_may_differ_and_nothing_is_predicted_across_documents(config, tmp_path):
    """Each document reads <s> a b … and predicts a b … </s>, in training and in evaluation."""
    vocabulary = {"<s>": 0, "</s>": 1, "?": 2}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.save(str(tmp_path / "words.json"))
    words = dataclasses.replace(
        config, tokenizer=TokenizerConfig("huggingface", str(tmp_path / "words.json")), shuffle=False
    )
    info = inspect_text(words)
    assert (info.begin, info.end, info.train_tokens) == (0, 1, sum(1 + len(document) for document in DOCUMENTS))
    rows = take(make_text_train_iterator(words, info.train_examples, 0, 0, 1), 1)
    keep = rows["loss_mask"]
    assert keep.sum() == info.train_tokens
    assert rows["tokens"][keep].tolist() == [token for each in DOCUMENTS for token in [0, *[2] * len(each)]]
    assert rows["targets"][keep].tolist() == [token for each in DOCUMENTS for token in [*[2] * len(each), 1]]
    windows = take(iter(make_text_eval_batches(words, "test", 1, 0, 1)), None)
    keep = windows["loss_mask"]
    assert windows["tokens"][keep].tolist() == [token for each in DOCUMENTS[:5] for token in [0, *[2] * len(each)]]
    assert windows["targets"][keep].tolist() == [token for each in DOCUMENTS[:5] for token in [*[2] * len(each), 1]]
    sizes = [size for each in DOCUMENTS[:5] for size in [*(len(letter.encode()) for letter in each), 0]]
    assert windows["target_bytes"][keep].tolist() == sizes


def test_sources_of_a_mixture_may_have_settings_of_their_own(config, tmp_path, stdlib_dir):
    lines = [json.dumps({"body": f"{'xyz'[i % 3] * 20}"}) for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    name = f"files:{tmp_path}/a.jsonl"
    own = {"format": "jsonl", "field": "body", "test_paths": [f"{tmp_path}/a.jsonl"]}
    entries = [[name, 1, own], ["files", 2.0], ["stdlib", 1, {"train_split": "train[:2]", "test_split": "test[:1]"}]]
    mixed = dataclasses.replace(config, mixture=tuple(entries), data_dir=stdlib_dir, cache_dir=str(tmp_path / "c"))
    batch = take(make_text_train_iterator(mixed, 8, 0, 0, 1), 2)
    assert np.bincount(batch["source"]).tolist() == [4, 8, 4]
    first = batch["source"] == 0
    assert set(batch["tokens"][first].ravel()) <= {END, *b"xyz"}
    document = int(batch["document"][first][0, 0])
    assert name_document(mixed, "train", 0, document) == f"{tmp_path}/a.jsonl, line {document + 1}"
    assert name_document(mixed, "train", 1, 12) == f"{tmp_path}/12.txt"
    windows = take(iter(make_text_eval_batches(mixed, "test", 16, 0, 1)), None)
    place = windows["source"].tolist()
    known = [source for source in place if source >= 0]
    assert known == sorted(known)
    assert set(known) == {0, 1, 2}
    assert known.count(0) == 9 * 3
    with pytest.raises(ValueError, match=r"format = 'csv' for files:.*: give one of text, jsonl, parquet"):
        dataclasses.replace(config, mixture=((name, 1, {"format": "csv"}),))
    with pytest.raises(ValueError, match=r"give \(name, weight\) .* with settings of test_paths, format, field"):
        dataclasses.replace(config, mixture=((name, 1, {"fields": "body"}),))
    with pytest.raises(ValueError, match=r"test_paths = 'x' for files:.*: give a list"):
        dataclasses.replace(config, mixture=((name, 1, {"test_paths": "x"}),))


class Prose(tfds.core.GeneratorBasedBuilder):
    """A set as tfds's own text sets are: of several configs, with other features beside the text."""

    VERSION = tfds.core.Version("2.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("en", "de")]  # noqa: RUF012
    TEXTS = {"train": ["The cat.", "", "Ein Käfer."], "validation": ["Sat."]}  # noqa: RUF012

    def _info(self):
        features = {"title": tfds.features.Text(), "text": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)}
        return GeneratedInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.TEXTS}

    def _generate_examples(self, split):
        for i, text in enumerate(self.TEXTS[split]):
            yield i, {"title": f"title {i}", "text": text, "id": i}


@pytest.mark.parametrize("name", ["prose/de", "prose/de:2.1.0"])
def test_sets_of_tfds_are_read_by_name(tmp_path, name, capsys):
    Prose(config="de", data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    config = TextConfig(name, data_dir=str(tmp_path), test_split="validation", length=32, threads=0, shuffle=False)
    batch = next(make_text_train_iterator(config, 1, 0, 0, 1))
    stream = [token for text in ("The cat.", "Ein Käfer.") for token in [END, *text.encode()]]
    assert batch["tokens"][0].tolist() == stream + [0] * (32 - len(stream))
    assert batch["document"][0].tolist() == [0] * 9 + [1] * 12 + [-1] * (32 - len(stream))
    assert name_document(config, "train", 0, 1) == "prose/de/2.1.0[train], example 2"
    assert "1 document (prose/de/2.1.0[train], example 1) without text left out" in capsys.readouterr().out
    windows = take(iter(make_text_eval_batches(config, "validation", 1, 0, 1)), None)
    assert windows["target_bytes"].sum() == 4
    titles = dataclasses.replace(config, field="title", train_split="train[1:2]")
    assert bytes(next(make_text_train_iterator(titles, 1, 0, 0, 1))["tokens"][0, 1:8].tolist()) == b"title 1"
    with pytest.raises(ValueError, match=r"feature 'id' of data set prose/de/2.1.0\[train\] is not text"):
        inspect_text(dataclasses.replace(config, field="id"))


@pytest.mark.parametrize(("batch_size", "hosts"), [(4, 1), (4, 2), (100, 1)])
def test_evaluation_counts_every_byte_of_every_document_once(config, batch_size, hosts):
    parts = [list(make_text_eval_batches(config, "test", batch_size, host, hosts)) for host in range(hosts)]
    steps = len(parts[0])
    whole = {key: np.concatenate([part[step][key] for step in range(steps) for part in parts]) for key in parts[0][0]}
    windows = [pack([document], 8) for document in DOCUMENTS[:5]]
    for number, window in enumerate(windows):
        window["document"] += number * window["loss_mask"]
        window["source"] = np.zeros(len(window["tokens"]), np.int32)
    expected = {key: np.concatenate([window[key] for window in windows]) for key in windows[0]}
    count = len(expected["tokens"])
    assert steps == -(-count // batch_size)
    # A window begins at position 0, as a row does.
    expected["position"] = np.where(expected["loss_mask"], np.arange(8), 0)
    assert_same({key: whole[key][:count] for key in expected}, expected)
    np.testing.assert_array_equal(whole["index"], [*range(count)] + [-1] * (len(whole["index"]) - count))
    np.testing.assert_array_equal(whole["mask"], whole["index"] >= 0)
    for key in expected:
        blank = -1 if key in ("source", "document") else 0
        np.testing.assert_array_equal(whole[key][count:], np.full_like(whole[key][count:], blank))
    assert whole["target_bytes"].dtype == np.int32
    np.testing.assert_array_equal(whole["target_bytes"], whole["loss_mask"] & (whole["targets"] != END))
    assert whole["target_bytes"].sum() == sum(len(document.encode()) for document in DOCUMENTS[:5])


def test_bytes_are_counted_once_though_the_tokenizer_changes_the_text(config, tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "c": 1, "?": 2}, unk_token="?"))
    model.normalizer = tokenizers.normalizers.NFD()
    model.save(str(tmp_path / "words.json"))
    words = dataclasses.replace(config, tokenizer=TokenizerConfig("huggingface", str(tmp_path / "words.json")))
    batch = take(iter(make_text_eval_batches(words, "test", 3, 0, 1)), None)
    assert batch["target_bytes"].sum() == sum(len(document.encode()) for document in DOCUMENTS[:5])
    assert (batch["targets"] == 0)[batch["loss_mask"]].sum() == 5
    assert inspect_text(words).train_tokens == 2 * len(DOCUMENTS)


def test_the_standard_library_is_the_default(stdlib_dir):
    config = TextConfig(data_dir=stdlib_dir, train_split="train[:40]", length=64)
    builder = source.open_builder("stdlib", stdlib_dir)
    texts = {split: [each["text"] for each in builder.as_data_source(split)] for split in ("train[:40]", "test")}
    info = inspect_text(config)
    train = [each for each in texts["train[:40]"] if each]
    assert (info.vocab_size, info.begin, info.end, info.length) == (257, 256, 256, 64)
    assert (info.train_documents, info.train_bytes) == (len(train), sum(map(len, train)))
    assert info.train_tokens == info.train_documents + info.train_bytes
    assert info.train_examples == -(-info.train_tokens // 64)
    assert info.manifests == {"stdlib": builder.info.metadata["manifest_sha256"]}
    size = sum(batch["target_bytes"].sum() for batch in make_text_eval_batches(config, "test", 512, 0, 1))
    assert size == sum(map(len, texts["test"]))
    row = next(make_text_train_iterator(config, 4, 0, 0, 1))
    assert open_tokenizer(config.tokenizer).decode(row["tokens"][0]).encode() in b"".join(train)


@pytest.mark.parametrize("form", ["text", "jsonl", "parquet"])
def test_files_hold_out_documents_by_the_hash_of_their_text(tmp_path, form):
    documents = [f"text number {i} ä" for i in range(200)]
    if form == "text":
        for i, document in enumerate(documents):
            (tmp_path / f"{i:03}").write_text(document)
    elif form == "jsonl":
        (tmp_path / "a").write_text("\n\n".join(json.dumps({"body": document, "id": 0}) for document in documents))
    else:
        parquet.write_table(pyarrow.table({"id": range(200), "body": documents}), tmp_path / "a", row_group_size=70)
    config = TextConfig("files", paths=(f"{tmp_path}/**",), format=form, field="body", length=40, shuffle=False)
    for split in ("train", "test"):
        batch = take(iter(make_text_eval_batches(config, split, 1, 0, 1)), None)
        decoded = [
            open_tokenizer(config.tokenizer).decode(row[keep])
            for row, keep in zip(batch["tokens"], batch["loss_mask"], strict=True)
        ]
        assert decoded == [each for each in documents if held_out(each.encode()) == (split == "test")]
    assert 1 <= len(decoded) <= 20


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (None, {}, r"there is no file .*/x: correct data.paths"),
        (b"", {}, r"file .*/x is empty: leave it out of data.paths"),
        (b"text", {"train_split": "validation"}, r"files have no split 'validation': choose train or test"),
        (
            b"text",
            {"train_split": "test"},
            r"data files\[test\] has no text: .* name the files to test on in data.test_paths",
        ),
        (b'{"text": "a"}\n{"body": "b"}\n', {"format": "jsonl"}, r"/x, line 2 has no text in field 'text'"),
        (b'{"text": "a"}\n["text"]\n', {"format": "jsonl"}, r"/x, line 2 has no text in field 'text'"),
        (b'{"text": "a"}\n\n{"te\n', {"format": "jsonl"}, r"/x, line 3 is not JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', {"format": "jsonl"}, r"/x, line 2: byte 24 of the file is not UTF-8"),
        (b"text", {"format": "parquet"}, r"file .*/x is not Parquet .*: is data.format right"),
        (pyarrow.table({"body": ["b"]}), {"format": "parquet"}, r"/x has no column 'text' \(it has body\)"),
        (pyarrow.table({"text": ["b", None] * 9}), {"format": "parquet"}, r"/x, row 2 has no text in column 'text'"),
        (b"text", {"name": "stdlib", "train_split": "valid"}, r"stdlib/.* has no split 'valid'.*: choose one of train"),
        (b"text", {"name": "stdlib", "field": "body"}, r"stdlib/.* has no feature 'body' \(it has name, text\)"),
        (b"text", {"name": "prose"}, r"'prose' is neither built in \(digits, stdlib\) nor prepared"),
        (b"text", {"name": "digits"}, r"digits/1.0.0 has no feature 'text' \(it has image, label\)"),
    ],
)
def test_text_that_is_not_there_is_named(tmp_path, stdlib_dir, data_dir, content, fields, message):
    if isinstance(content, bytes):
        (tmp_path / "x").write_bytes(content)
    elif content is not None:
        parquet.write_table(content, tmp_path / "x")
    folder = data_dir if fields.get("name") == "digits" else stdlib_dir
    config = TextConfig(**({"name": "files", "paths": (str(tmp_path / "x"),), "data_dir": folder} | fields))
    with pytest.raises(ValueError, match=message):
        make_text_train_iterator(config, 8, 0, 0, 1)


def test_only_bytes_accept_what_is_not_utf8(tmp_path):
    (tmp_path / "x").write_bytes(b"ab\xff")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0})).save(str(tmp_path / "t"))
    config = TextConfig("files", paths=(str(tmp_path / "x"),), length=4)
    np.testing.assert_array_equal(next(make_text_train_iterator(config, 1, 0, 0, 1))["tokens"], [[END, 97, 98, 255]])
    words = dataclasses.replace(config, tokenizer=TokenizerConfig("huggingface", str(tmp_path / "t")))
    with pytest.raises(ValueError, match=r"/x: byte 2 is not UTF-8"):
        make_text_train_iterator(words, 1, 0, 0, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, r"data.length is 0: it must be at least 1"),
        ({"threads": -1}, r"data.threads is -1: it must be at least 0"),
        ({"name": "files"}, r"data.name is 'files', but data.paths is empty"),
        ({"mixture": (("files", 1.0),)}, r"data.name is 'files', but data.paths is empty"),
        ({"mixture": (("stdlib", 0),)}, r"data.mixture has the entry \('stdlib', 0\): give \(name, weight\)"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**fields)


def test_hosts_and_seeds_out_of_range_are_refused(config):
    with pytest.raises(ValueError, match=r"a batch of 10 examples cannot be shared by 4 processes"):
        make_text_train_iterator(config, 10, 0, 0, 4)
    with pytest.raises(ValueError, match=r"the seed of the data is -1"):
        make_text_train_iterator(config, 8, -1, 0, 1)


def test_a_vocabulary_beyond_the_models_is_refused(config):
    check_vocabulary(config, 257)
    with pytest.raises(
        ValueError, match=r"has 257 tokens and the model a vocabulary of 256: set model.vocab_size to at"
    ):
        check_vocabulary(config, 256)
