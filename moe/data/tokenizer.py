"""Tokenizers: bytes, or a file that a user has, of Hugging Face's `tokenizers` or of SentencePiece.

All of them say which bytes of a text its tokens stand for, so that models with different tokenizers can be compared in
bits per byte.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64

# What published tokenizers call the token that a document ends with.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
# No published vocabulary has a tenth of it; memory is set aside for all up to the largest.
_MOST_TOKENS = 2**24
_EXTRA = "pip install 'moe-jax[text]'"

Ids: TypeAlias = np.ndarray | Sequence[int]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer.

    kind: "bytes"; "huggingface": a `tokenizer.json`; "sentencepiece": a `.model`. path: that file.
    begin: the token that stands before a document. Empty: the one that the file itself puts before a text (a template
        of Hugging Face's, the <s> of SentencePiece), or if it puts none, the end.
    end: the token that a document ends with. Empty: the one that the file itself puts behind a text, or declares as
        the end of a sentence, or else a usual name that it knows.
    """

    kind: Literal["bytes", "huggingface", "sentencepiece"] = "bytes"
    path: str = ""
    begin: str = ""
    end: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError if kind and path don't go together."""
        if self.kind == "bytes" and (self.path or self.begin or self.end):
            raise ValueError(
                "data.tokenizer.kind is 'bytes', which takes no file and no other begin or end "
                f"({self.path or self.begin or self.end!r}): choose huggingface or sentencepiece, or leave path, begin "
                "and end empty"
            )
        if self.kind != "bytes" and not self.path:
            raise ValueError(f"data.tokenizer.path is empty: a tokenizer of kind {self.kind!r} is read from a file")


class NotUtf8Error(ValueError):
    """A text has a byte, at `position`, that is not UTF-8."""

    def __init__(self, position: int) -> None:
        """position: from the text's beginning."""
        super().__init__(
            f"byte {position} is not UTF-8, which this tokenizer needs: convert the text, or use "
            "data.tokenizer.kind = 'bytes'"
        )
        self.position = position


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    vocab_size: one more than the largest id. begin: id of the token before a document; end: of that behind one; they
    may be the same, and no text encodes to them.
    """

    vocab_size: int
    begin: int
    end: int

    def encode(self, text: bytes | str) -> Int32[np.ndarray, "L"]:
        """The ids of a text, without any control token. Raises NotUtf8Error if bytes that must be UTF-8 are not."""

    def encode_spans(self, text: bytes | str) -> tuple[Int32[np.ndarray, "L"], Int64[np.ndarray, "L"]]:
        """The ids, and how many bytes of the text stand up to the end of each: they never fall, nor exceed its size.

        What the last one leaves out, such as a space that the tokenizer drops, has no token. A token whose place in a
        character cannot be told counts all of it if it is the first there, or the last, and otherwise none.
        """

    def decode(self, ids: Ids) -> str:
        """The text of ids, without control tokens; what is no UTF-8 becomes U+FFFD."""


class Bytes:
    """A token per byte, and 256 before and behind documents."""

    vocab_size = 257
    begin = end = 256

    def encode(self, text: bytes | str) -> Int32[np.ndarray, "L"]:
        """The bytes, of a str in UTF-8."""
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int32)

    def encode_spans(self, text: bytes | str) -> tuple[Int32[np.ndarray, "L"], Int64[np.ndarray, "L"]]:
        """See `Tokenizer`."""
        ids = self.encode(text)
        return ids, np.arange(1, len(ids) + 1, dtype=np.int64)

    def decode(self, ids: Ids) -> str:
        """The text of the ids below 256."""
        return bytes(token for token in np.asarray(ids, np.int64).tolist() if token < 256).decode(errors="replace")


class HuggingFace:
    """A `tokenizer.json`; names of control tokens that stand in a text are encoded as text.

    Truncation and padding that the file asks for are switched off.
    """

    def __init__(self, path: str, begin: str = "", end: str = "") -> None:
        """Reads the file; errors as `open_tokenizer`."""
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise _not_installed("tokenizers", path) from error
        self._path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except BaseException as error:
            _raise_unless_theirs(error)
            raise ValueError(f"tokenizer file {path} is no tokenizer.json of `tokenizers` ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= _MOST_TOKENS:
            raise ValueError(
                f"tokenizer file {path} numbers its {len(vocabulary)} tokens up to {self.vocab_size - 1}: it must have "
                f"some, and none above {_MOST_TOKENS - 1}"
            )
        before, behind = self._template()
        self.end = behind if behind is not None and not end else _find(vocabulary, end, path, "end")
        self.begin = _find(vocabulary, begin, path, "begin") if begin else self.end if before is None else before
        if (highest := max(self.begin, self.end)) >= self.vocab_size:
            raise ValueError(
                f"tokenizer file {path} puts token {highest} about a text and numbers its tokens up to "
                f"{self.vocab_size - 1}: name others in data.tokenizer.begin and data.tokenizer.end"
            )
        # In a byte-level vocabulary each letter of a piece is a byte, so that its size is known by itself.
        self._sizes = np.zeros(self.vocab_size, np.int64)
        if _is_byte_level(json.loads(self._tokenizer.to_str())):
            for piece, token in vocabulary.items():
                self._sizes[token] = len(piece)
            for token, added in self._tokenizer.get_added_tokens_decoder().items():
                self._sizes[token] = len(added.content.encode())

    def encode(self, text: bytes | str) -> Int32[np.ndarray, "L"]:
        """See `Tokenizer`."""
        return np.array(self._encode(_utf8(text)).ids, np.int32)

    def encode_spans(self, text: bytes | str) -> tuple[Int32[np.ndarray, "L"], Int64[np.ndarray, "L"]]:
        """See `Tokenizer`."""
        text = _utf8(text)
        encoding = self._encode(text)
        ids = np.array(encoding.ids, np.int32)
        starts = _byte_offsets(text)
        ends = np.cumsum(self._sizes[ids])
        if not len(ids) or ends[-1] != starts[-1]:  # not byte-level, or the text was changed first
            ends = starts[[end for _, end in encoding.offsets]]
        return ids, np.maximum.accumulate(ends.astype(np.int64))

    def decode(self, ids: Ids) -> str:
        """See `Tokenizer`."""
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    def _encode(self, text: str, add_special_tokens: bool = False) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            _raise_unless_theirs(error)
            raise ValueError(f"tokenizer file {self._path} cannot encode this ({error})") from error

    def _template(self) -> tuple[int | None, int | None]:
        """The tokens that the file puts before and behind a text, where it is one of them."""
        try:
            encoding = self._encode("a", add_special_tokens=True)
        except ValueError:  # it doesn't know the letter
            return None, None
        text = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
        if not text:
            return None, None
        before, behind = encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]
        return (before[0] if len(before) == 1 else None, behind[0] if len(behind) == 1 else None)


class SentencePiece:
    """A SentencePiece model, with its tokens for the beginning and the end of a sentence about documents."""

    def __init__(self, path: str, begin: str = "", end: str = "") -> None:
        """Reads the file; errors as `open_tokenizer`."""
        try:
            import sentencepiece
        except ModuleNotFoundError as error:
            raise _not_installed("sentencepiece", path) from error
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer file {path} is no SentencePiece model ({error})") from error
        model = self._processor
        self.vocab_size = model.get_piece_size()
        pieces = {model.id_to_piece(token): token for token in range(self.vocab_size)}
        self.end = model.eos_id() if not end and model.eos_id() >= 0 else _find(pieces, end, path, "end")
        declared = model.bos_id() if model.bos_id() >= 0 else self.end
        self.begin = _find(pieces, begin, path, "begin") if begin else declared

    def encode(self, text: bytes | str) -> Int32[np.ndarray, "L"]:
        """See `Tokenizer`."""
        return np.array(self._processor.encode(_utf8(text), out_type=int), np.int32)

    def encode_spans(self, text: bytes | str) -> tuple[Int32[np.ndarray, "L"], Int64[np.ndarray, "L"]]:
        """See `Tokenizer`."""
        pieces = self._processor.encode(_utf8(text), return_type="proto").pieces
        ends = np.array([piece.end for piece in pieces], np.int64)
        return np.array([piece.id for piece in pieces], np.int32), np.maximum.accumulate(ends)

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
    kind = HuggingFace if config.kind == "huggingface" else SentencePiece
    return kind(config.path, config.begin, config.end)


def identify_tokenizer(config: TokenizerConfig) -> list[Any]:
    """Plain data that change when what the tokenizer makes of a text may change."""
    if config.kind == "bytes":
        return ["bytes"]
    package = {"huggingface": "tokenizers", "sentencepiece": "sentencepiece"}[config.kind]
    tokenizer = open_tokenizer(config)
    content = hashlib.sha256(Path(config.path).read_bytes()).hexdigest()
    return [package, importlib.metadata.version(package), content, tokenizer.begin, tokenizer.end]


def _not_installed(package: str, path: str) -> ValueError:
    return ValueError(f"tokenizer file {path} is read by the package {package}, not installed: {_EXTRA}")


def _raise_unless_theirs(error: BaseException) -> None:
    """Raises what `tokenizers` didn't: it knows plain exceptions, and panics, which aren't even that."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _find(vocabulary: dict[str, int], token: str, path: str, role: str) -> int:
    for name in (token,) if token else _END_TOKENS:
        if name in vocabulary:
            return vocabulary[name]
    raise ValueError(
        f"tokenizer file {path} has no token {token or ' or '.join(_END_TOKENS)} for the {role} of a document: name "
        f"one that it has in data.tokenizer.{role}"
    )


def _utf8(text: bytes | str) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise NotUtf8Error(error.start) from error


def _byte_offsets(text: str) -> Int64[np.ndarray, "L_1"]:
    """Bytes before every character of the text, and of all."""
    point = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
    sizes = 1 + sum((point >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _is_byte_level(part: Any) -> bool:
    """Whether a tokenizer's JSON, in any of its parts, writes bytes as one letter each, as GPT-2 does."""
    if isinstance(part, dict):
        return part.get("type") == "ByteLevel" or any(map(_is_byte_level, part.values()))
    return isinstance(part, list) and any(map(_is_byte_level, part))
