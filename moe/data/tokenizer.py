"""Tokenizers: bytes, or a file that a user has, of Hugging Face's `tokenizers` or of SentencePiece.

All of them say how many bytes of text a token stands for, so that models with different tokenizers can be compared in
bits per byte.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Int32

# What published tokenizers call the token between two documents.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
_EXTRA = "pip install 'moe-jax[text]'"

Ids: TypeAlias = np.ndarray | Sequence[int]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer.

    kind: "bytes"; "huggingface": a `tokenizer.json`; "sentencepiece": a `.model`. path: that file.
    end: the token between two documents; empty for what the file declares, or the usual name that it knows.
    """

    kind: Literal["bytes", "huggingface", "sentencepiece"] = "bytes"
    path: str = ""
    end: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError if kind and path don't go together."""
        if self.kind == "bytes" and (self.path or self.end):
            raise ValueError(
                f"data.tokenizer.kind is 'bytes', which takes no file and no other end ({self.path or self.end!r}): "
                "choose huggingface or sentencepiece, or leave path and end empty"
            )
        if self.kind != "bytes" and not self.path:
            raise ValueError(f"data.tokenizer.path is empty: a tokenizer of kind {self.kind!r} is read from a file")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    vocab_size: one more than the largest id. end: id of the token between two documents, which no text encodes to.
    token_bytes: int32 [vocab_size], the bytes of text that each token stands for, 0 for control tokens. A tokenizer
    that changes a text (a space before it, normalised letters) can make the sum differ from the bytes of the text.
    """

    vocab_size: int
    end: int
    token_bytes: np.ndarray

    def encode(self, text: bytes | str) -> Int32[np.ndarray, "L"]:
        """The ids of a text, without any control token. Raises ValueError if bytes that must be UTF-8 are not."""

    def decode(self, ids: Ids) -> str:
        """The text of ids, without control tokens; what is no UTF-8 becomes U+FFFD."""


class Bytes:
    """A token per byte, and 256 between documents."""

    vocab_size = 257
    end = 256
    token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode(self, text: bytes | str) -> Int32[np.ndarray, "L"]:
        """The bytes, of a str in UTF-8."""
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """The text of the ids below 256."""
        return bytes(token for token in np.asarray(ids, np.int64).tolist() if token < 256).decode(errors="replace")


class HuggingFace:
    """A `tokenizer.json`; names of control tokens that stand in a text are encoded as text.

    Truncation and padding that the file asks for are switched off.
    """

    def __init__(self, path: str, end: str = "") -> None:
        """Reads the file; errors as `open_tokenizer`."""
        tokenizers = _import("tokenizers", path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"tokenizer file {path} is no tokenizer.json of `tokenizers` ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end = _find_end(vocabulary, end, path)
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        byte_level = _is_byte_level(json.loads(self._tokenizer.to_str()))
        for piece, token in vocabulary.items():
            self.token_bytes[token] = len(piece) if byte_level else _piece_bytes(piece)
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            self.token_bytes[token] = 0 if added.special else len(added.content.encode())
        self.token_bytes[self.end] = 0

    def encode(self, text: bytes | str) -> Int32[np.ndarray, "L"]:
        """See `Tokenizer`."""
        return np.array(self._tokenizer.encode(_utf8(text), add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Ids) -> str:
        """See `Tokenizer`."""
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)


class SentencePiece:
    """A SentencePiece model; its end-of-sentence token stands between documents."""

    def __init__(self, path: str, end: str = "") -> None:
        """Reads the file; errors as `open_tokenizer`."""
        sentencepiece = _import("sentencepiece", path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer file {path} is no SentencePiece model ({error})") from error
        model = self._processor
        self.vocab_size = model.get_piece_size()
        pieces = {model.id_to_piece(token): token for token in range(self.vocab_size)}
        self.end = model.eos_id() if not end and model.eos_id() >= 0 else _find_end(pieces, end, path)
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        for piece, token in pieces.items():
            if not (model.is_control(token) or model.is_unknown(token) or token == self.end):
                self.token_bytes[token] = _piece_bytes(piece)

    def encode(self, text: bytes | str) -> Int32[np.ndarray, "L"]:
        """See `Tokenizer`."""
        return np.array(self._processor.encode(_utf8(text), out_type=int), np.int32)

    def decode(self, ids: Ids) -> str:
        """See `Tokenizer`."""
        return self._processor.decode(np.asarray(ids, np.int64).tolist())


@functools.lru_cache(maxsize=4)  # training, evaluation and generation ask for the same one
def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that the config names.

    Raises:
        ValueError: the file is missing or of another kind, its package isn't installed, or it has no end token.
    """
    if config.kind == "bytes":
        return Bytes()
    if not Path(config.path).is_file():
        raise ValueError(f"there is no tokenizer file {config.path}: correct data.tokenizer.path")
    return (
        HuggingFace(config.path, config.end) if config.kind == "huggingface" else SentencePiece(config.path, config.end)
    )


def _import(package: str, path: str) -> Any:
    try:
        return __import__(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"tokenizer file {path} is read by the package {package}, not installed: {_EXTRA}") from error


def _find_end(vocabulary: dict[str, int], end: str, path: str) -> int:
    for name in (end,) if end else _END_TOKENS:
        if name in vocabulary:
            return vocabulary[name]
    raise ValueError(
        f"tokenizer file {path} has no token {end or ' or '.join(_END_TOKENS)} to stand between documents: name one "
        "that it has in data.tokenizer.end"
    )


def _utf8(text: bytes | str) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} is not UTF-8, which this tokenizer needs: convert the text, or use "
            "data.tokenizer.kind = 'bytes'"
        ) from error


def _is_byte_level(part: Any) -> bool:
    """Whether a tokenizer's JSON, in any of its parts, writes bytes as one letter each, as GPT-2 does."""
    if isinstance(part, dict):
        return part.get("type") == "ByteLevel" or any(map(_is_byte_level, part.values()))
    return isinstance(part, list) and any(map(_is_byte_level, part))


def _piece_bytes(piece: str) -> int:
    """Bytes of a piece whose ▁ are spaces; <0x0A> is one byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace("▁", " ").encode())
