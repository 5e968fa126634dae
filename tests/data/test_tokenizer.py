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


def pieces(path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(path.with_suffix("")), vocab_size=310, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_level(folder / "tokenizer.json")
    pieces(folder / "pieces.model")
    return {
        "bytes": TokenizerConfig(),
        "huggingface": TokenizerConfig("huggingface", str(folder / "tokenizer.json")),
        "sentencepiece": TokenizerConfig("sentencepiece", str(folder / "pieces.model")),
    }


@pytest.mark.parametrize("kind", ["bytes", "huggingface", "sentencepiece"])
def test_a_text_comes_back_and_its_bytes_are_counted(configs, kind):
    tokenizer = open_tokenizer(configs[kind])
    before = kind == "sentencepiece"  # it writes a space before the text, and takes it away again
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids.tolist(), tokenizer.end]) == text
        assert tokenizer.end not in ids
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + (before and text != "")
    assert tokenizer.token_bytes[tokenizer.end] == 0


def test_bytes_are_their_own_ids(configs):
    tokenizer = open_tokenizer(configs["bytes"])
    assert (tokenizer.vocab_size, tokenizer.end) == (257, 256)
    np.testing.assert_array_equal(tokenizer.encode(bytes(range(256))), np.arange(256))
    assert tokenizer.decode([0x41, 0xFF, 256, 0x42]) == "A\ufffdB"


def test_each_byte_level_token_counts_its_own_bytes(configs):
    tokenizer = open_tokenizer(configs["huggingface"])
    raw = tokenizers.Tokenizer.from_file(configs["huggingface"].path)
    assert tokenizer.token_bytes[raw.token_to_id("猫 🎉")] == 8
    assert tokenizer.token_bytes[raw.token_to_id("<pad>")] == 0
    assert tokenizer.token_bytes[raw.token_to_id("Ġreturn")] == 7
    assert tokenizer.vocab_size == raw.get_vocab_size(with_added_tokens=True)


def test_another_end_token_may_be_named(configs):
    for kind, end in (("huggingface", "<pad>"), ("sentencepiece", "<s>")):
        tokenizer = open_tokenizer(TokenizerConfig(kind, configs[kind].path, end))
        assert tokenizer.end != open_tokenizer(configs[kind]).end
        with pytest.raises(ValueError, match=r"has no token <stop> to stand between documents: name one that"):
            open_tokenizer(TokenizerConfig(kind, configs[kind].path, "<stop>"))


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
        ({"path": "x.json"}, r"'bytes', which takes no file and no other end \('x.json'\)"),
        ({"kind": "huggingface"}, r"path is empty: a tokenizer of kind 'huggingface' is read from a file"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**fields)
