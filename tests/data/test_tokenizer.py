import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers

from moe.data.tokenizer import TokenizerConfig, open_tokenizer

CORPUS = [
    "def résumé(x):\n    return x + 1\n",
    "the cat sat on the mat — naïve 猫\n",
    "for i in range(10): print(i)\n",
] * 4
TEXTS = ["", "def f(x): return x", "naïve — 猫 🎉\n\n\tend", "  two  spaces ", "a <|endoftext|> </s> b"]


def byte_level(path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["猫 🎉"])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path))


def metaspace(path):
    """As Llama's: a space becomes ▁, also before the text, and unknown characters are spelt in bytes."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {letter: 259 + i for i, letter in enumerate("▁adefinrtuvx():ïé")}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path))


def sentencepiece_of(path, **settings):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(path.with_suffix("")), vocab_size=310, model_type="bpe",
        byte_fallback=True, minloglevel=2, **settings,
    )  # fmt: skip
    return TokenizerConfig("sentencepiece", str(path))


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_level(folder / "tokenizer.json")
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = sentencepiece_of(folder / "normalised.model", normalization_rule_name="nmt_nfkc")
    metaspace(folder / "metaspace.json")
    return {
        "normalised": model,
        "metaspace": TokenizerConfig("huggingface", str(folder / "metaspace.json")),
        "bytes": TokenizerConfig(),
        "huggingface": TokenizerConfig("huggingface", str(folder / "tokenizer.json")),
        "sentencepiece": sentencepiece_of(folder / "pieces.model", **identity),
    }


KINDS = ("bytes", "huggingface", "sentencepiece", "normalised", "metaspace")


@pytest.mark.parametrize("kind", ["bytes", "huggingface", "sentencepiece"])
def test_a_text_comes_back(configs, kind):
    tokenizer = open_tokenizer(configs[kind])
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.begin, *ids.tolist(), tokenizer.end]) == text
        assert not {tokenizer.begin, tokenizer.end} & set(ids.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_a_text_belongs_to_one_token_or_to_none(configs, kind):
    tokenizer = open_tokenizer(configs[kind])
    for text in TEXTS:
        ids, ends = tokenizer.encode_spans(text)
        assert (ids.dtype, ends.dtype) == (np.int32, np.int64)
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        np.testing.assert_array_equal(tokenizer.encode_spans(text.encode())[1], ends)
        assert (np.diff(ends, prepend=0) >= 0).all()
        size = len(text.encode())
        # What a tokenizer drops is space at the end.
        left = size - len(text.encode().rstrip()) if kind == "normalised" else 0
        assert size - left <= max([0, *ends]) <= size


def test_tokens_stand_for_the_bytes_that_they_say(configs):
    """By hand: what each kind makes of letters of one to four bytes."""
    text = "naïve — 猫 🎉"
    for kind in KINDS[1:]:
        tokenizer = open_tokenizer(configs[kind])
        ids, ends = tokenizer.encode_spans(text)
        # Wherever a character ends that ends a token, the bytes up to there are those of the text up to there.
        for place in range(1, len(ids) + 1):
            decoded = tokenizer.decode(ids[:place])
            if decoded and text.startswith(decoded) and "\N{REPLACEMENT CHARACTER}" not in decoded:
                assert ends[place - 1] == len(decoded.encode()), (kind, decoded)
    _, ends = open_tokenizer(configs["huggingface"]).encode_spans("\N{PARTY POPPER}")
    np.testing.assert_array_equal(ends, [1, 2, 3, 4])
    raw = tokenizers.Tokenizer.from_file(configs["huggingface"].path)
    ids, ends = open_tokenizer(configs["huggingface"]).encode_spans("x return 猫 🎉")
    np.testing.assert_array_equal(ids[-3:-1], [raw.token_to_id("Ġreturn"), raw.token_to_id("Ġ")])
    np.testing.assert_array_equal(ends, [1, 8, 9, 17])


def test_bytes_are_their_own_ids(configs):
    tokenizer = open_tokenizer(configs["bytes"])
    assert (tokenizer.vocab_size, tokenizer.end) == (257, 256)
    np.testing.assert_array_equal(tokenizer.encode(bytes(range(256))), np.arange(256))
    assert tokenizer.decode([0x41, 0xFF, 256, 0x42]) == "A\ufffdB"


def test_a_file_says_what_documents_begin_and_end_with(configs, tmp_path):
    """The template of a tokenizer.json, the control tokens of a SentencePiece model; else the end serves for both."""
    bytewise = open_tokenizer(configs["huggingface"])
    assert (bytewise.begin, bytewise.end) == (1, 1)
    pieces = sentencepiece.SentencePieceProcessor(model_file=configs["sentencepiece"].path)
    read = open_tokenizer(configs["sentencepiece"])
    assert (read.begin, read.end) == (pieces.bos_id(), pieces.eos_id()) == (1, 2)
    raw = tokenizers.Tokenizer.from_file(configs["huggingface"].path)
    assert bytewise.vocab_size == raw.get_vocab_size(with_added_tokens=True)
    specials = [("<pad>", 0), ("<|endoftext|>", 1)]
    for template, begin, end in (
        ("<pad> $A", 0, 1),
        ("<pad> $A <|endoftext|>", 0, 1),
        ("<|endoftext|> $A <pad>", 1, 0),
        ("$A <pad>", 0, 0),
        ("<pad> <pad> $A", 1, 1),
    ):
        raw.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=specials)
        raw.save(str(tmp_path / f"{template}.json"))
        tokenizer = open_tokenizer(TokenizerConfig("huggingface", str(tmp_path / f"{template}.json")))
        assert (tokenizer.begin, tokenizer.end) == (begin, end), template


def test_other_tokens_about_documents_may_be_named(configs):
    for kind, other in (("huggingface", "<pad>"), ("sentencepiece", "<unk>")):
        path, usual = configs[kind].path, open_tokenizer(configs[kind])
        tokenizer = open_tokenizer(TokenizerConfig(kind, path, begin=other))
        assert (tokenizer.begin, tokenizer.end) == (0, usual.end)
        tokenizer = open_tokenizer(TokenizerConfig(kind, path, end=other))
        assert tokenizer.end == 0
        for role in ("begin", "end"):
            with pytest.raises(ValueError, match=rf"has no token <stop> for the {role} of a document: name one that"):
                open_tokenizer(TokenizerConfig(kind, path, **{role: "<stop>"}))


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_a_file_that_cannot_serve_is_named(configs, kind, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"there is no tokenizer file /nowhere/x: correct data.tokenizer.path"):
        open_tokenizer(TokenizerConfig(kind, "/nowhere/x"))
    broken = tmp_path / "broken"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer file .*broken is no (tokenizer.json|SentencePiece model)"):
        open_tokenizer(TokenizerConfig(kind, str(broken)))
    with pytest.raises(ValueError, match=r"byte 2 is not UTF-8, which this tokenizer needs: .* 'bytes'"):
        open_tokenizer(configs[kind]).encode(b"ab\xff")
    package = {"huggingface": "tokenizers", "sentencepiece": "sentencepiece"}[kind]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"read by the package {package}, not installed: pip install 'moe-jax\[text"):
        open_tokenizer(TokenizerConfig(kind, str(broken)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "x.json"}, r"'bytes', which takes no file and no other begin or end \('x.json'\)"),
        ({"begin": "<s>"}, r"'bytes', which takes no file and no other begin or end \('<s>'\)"),
        ({"kind": "huggingface"}, r"path is empty: a tokenizer of kind 'huggingface' is read from a file"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**fields)
