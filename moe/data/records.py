"""The records of a prepared set, read at random; a damaged one is named by file and place, and skipped where wanted.

array_record keeps hashes of what it stores, so that a record whose bytes have changed fails instead of giving others.
A file that was cut short has lost the index at its end, and with it all of its records.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Int, Int32, Shaped

# What to do about records that can't be used: end the run, or do without them and count them.
Corrupt: TypeAlias = Literal["stop", "skip"]
REMEDY = "prepare the set again, choose another split, or leave such examples out with data.corrupt=skip"
_ALL = 4096  # a split of so many examples is looked at whole before a run,
_SAMPLE = 1024  # and so many of a larger one
_BLOCK = 256  # examples that are looked at, at once
_NAMED = 10  # skipped records that are named one by one


class Damage(NamedTuple):
    """Why a record can't be read, in place of its example."""

    reason: str


class Records:
    """The examples of a split as tfds decodes them, in any order, and where each lies in the set's files.

    name: of set, version and split, for messages.
    """

    def __init__(
        self, builder: tfds.core.DatasetBuilder, split: str, decoders: Mapping[str, Any] | None = None
    ) -> None:
        """Opens a split, or a slice of one. decoders: of tfds, by feature.

        Raises ValueError if the split is unknown or empty, or stored for reading in order only.
        """
        self.name = f"{builder.info.full_name}[{split}]"
        self._examples = _open_split(builder, split, decoders)
        self._count = len(self._examples)
        self._files = [
            (str(instruction.filename), instruction.skip, instruction.take)
            for instruction in builder.info.splits[split].file_instructions
        ]

    def __len__(self) -> int:
        """How many examples the split holds."""
        return self._count

    def fetch(self, places: Sequence[int]) -> list[Any]:
        """The examples at these places of the split, or `Damage` for those that can't be read."""
        try:
            return list(self._examples.__getitems__(places))
        except Exception as error:  # tfds, protobuf and array_record each have their own, as have NumPy's arrays
            if len(places) == 1:
                return [Damage(_reason(error))]
        # They are read together and fail together: which one it is, the halves tell.
        half = len(places) // 2
        return self.fetch(places[:half]) + self.fetch(places[half:])

    def describe(self, place: int, reason: str) -> str:
        """The sentence about the damaged example at this place of the split, as yet without a remedy."""
        file, record = self._locate(place)
        return f"the example at index {place} of {self.name} can't be used ({reason}): it is record {record} of {file}"

    def _locate(self, place: int) -> tuple[str, int]:
        """The file that holds the example at this place of the split, and the example's place in the file."""
        for file, skip, take in self._files:
            if place < take:
                return file, skip + place
            place -= take
        raise IndexError(place)


class Rows(NamedTuple):
    """Examples as read. places: theirs in the split. skipped: which rows don't have the example asked for."""

    images: Shaped[np.ndarray, "B h w c"]
    labels: Int32[np.ndarray, "B"]
    places: Int32[np.ndarray, "B"]
    skipped: Bool[np.ndarray, "B"]


class ImageRecords(Records):
    """The records of an image classification set: images of one shape, and labels within the set's classes."""

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        shape: tuple[int, ...],
        corrupt: Corrupt,
        decoders: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens a split of a set that `check_features` finds good.

        shape: of the images that are made of the stored ones; () for any, until the attribute is set.
        """
        super().__init__(builder, split, decoders)
        self.shape = shape
        self._classes: int | None = getattr(builder.info.features["label"], "num_classes", None)
        self._corrupt = corrupt
        self._held: list[Any] | None = None
        self._said: set[int] = set()

    def fetch(self, places: Sequence[int]) -> list[Any]:
        """As `Records.fetch`, of what is held where something is."""
        return super().fetch(places) if self._held is None else [self._held[place] for place in places]

    def hold(self, change: Callable[[Any], Any]) -> None:
        """Reads all of the split now, and keeps its images as `change` returns them. Raises OSError as `read`."""
        held: list[Any] = []
        for start in range(0, len(self), _BLOCK):
            for place, example in enumerate(self.fetch(range(start, min(start + _BLOCK, len(self)))), start):
                try:
                    held.append(example if isinstance(example, Damage) else _changed(example, change))
                except Exception as error:
                    held.append(Damage(_reason(error)))
                if isinstance(held[-1], Damage):
                    self._meet(place, held[-1].reason)
        self._held = held

    def read(self, index: Int[np.ndarray, "B"], make: Callable[[int, Any], np.ndarray], replace: bool = False) -> Rows:
        """The examples at these places.

        Args:
            index: places in the split.
            make: returns the image of a row, by the number of the row and the stored image.
            replace: whether a damaged example that is skipped is replaced by the next one of the split that isn't, the
                first behind the last; or else its row is blank.

        Raises:
            OSError: an example can't be used and is not to be skipped, or none can be used at all.
        """
        places = [int(place) for place in index]
        rows = [self._row(row, *given, make, replace) for row, given in enumerate(self._pairs(places))]
        images, labels, used, skipped = zip(*rows, strict=True)
        return Rows(np.stack(images), np.array(labels, np.int32), np.array(used, np.int32), np.array(skipped, bool))

    def check(self) -> str:
        """Looks at labels before a run: at all of a small split, else at 1024 spread evenly; says what is skipped.

        Raises OSError if an example can't be used and is not to be skipped, or none can be used.
        """
        places = range(len(self)) if len(self) <= _ALL else np.linspace(0, len(self) - 1, _SAMPLE).astype(int).tolist()
        damaged, first = 0, ""
        for start in range(0, len(places), _BLOCK):
            for place, example in self._pairs(places[start : start + _BLOCK]):
                try:
                    self._label(example)
                except Exception as error:
                    damaged, sentence = damaged + 1, self.describe(place, _reason(error))
                    first = first or sentence
                    if self._corrupt == "stop":
                        raise OSError(f"{first}; {REMEDY}") from error
        if damaged == len(places):
            raise OSError(f"of {self.name} none of {damaged} examples can be used, such as: {first}; {REMEDY}")
        if not damaged:
            return ""
        return f"{self.name}: {damaged} of the {len(places)} examples looked at are skipped; {first}"

    def _pairs(self, places: Sequence[int]) -> list[tuple[int, Any]]:
        return list(zip(places, self.fetch(places), strict=True))

    def _row(
        self, row: int, place: int, example: Any, make: Callable[[int, Any], np.ndarray], replace: bool
    ) -> tuple[np.ndarray, int, int, bool]:
        """Image, label, place and whether it was skipped, of one row of `read`."""
        for ahead in range(self._count):
            used = (place + ahead) % self._count
            if ahead:
                (example,) = self.fetch([used])
            try:
                label = self._label(example)
                return self._image(row, example, make), label, used, bool(ahead)
            except Exception as error:  # Pillow's decoders raise all kinds
                self._meet(used, _reason(error), error)
            if not replace:
                return np.zeros(self.shape, np.uint8), 0, place, True
        raise OSError(f"none of the {len(self)} examples of {self.name} can be used: {REMEDY.partition(',')[0]}")

    def _label(self, example: Any) -> int:
        if isinstance(example, Damage):
            raise ValueError(example.reason)
        label = int(example["label"])
        if self._classes is not None and not 0 <= label < self._classes:
            raise ValueError(f"its label is {label}, and the {self._classes} classes are 0 to {self._classes - 1}")
        return label

    def _image(self, row: int, example: Any, make: Callable[[int, Any], np.ndarray]) -> np.ndarray:
        image = make(row, example["image"])
        if self.shape and image.shape != self.shape:
            raise ValueError(f"its image becomes {image.shape}, and those of the set {self.shape}")
        return image

    def _meet(self, place: int, reason: str, cause: Exception | None = None) -> None:
        """Raises OSError for a damaged example; or, where such are skipped, names it once."""
        sentence = self.describe(place, reason)
        if self._corrupt == "stop":
            raise OSError(f"{sentence}; {REMEDY}") from cause
        if place not in self._said:
            self._said.add(place)
            if len(self._said) <= _NAMED:
                more = "; further ones are counted only" if len(self._said) == _NAMED else ""
                print(f"skipped: {sentence}{more}", flush=True)


class Split:
    """What the splits of images have in common, however these are stored."""

    _records: ImageRecords
    _size: int

    def __len__(self) -> int:
        """How many examples the split holds."""
        return len(self._records)

    def __repr__(self) -> str:
        """The set, its version, the split and the size of the images."""
        return f"{type(self).__name__}({self._records.name}, size={self._size})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width and channels of the images."""
        return self._records.shape

    def check(self) -> str:
        """See `ImageRecords.check`."""
        return self._records.check()


def _changed(example: Any, change: Callable[[Any], Any]) -> dict[str, Any]:
    return {"image": change(example["image"]), "label": example["label"]}


def _reason(error: Exception) -> str:
    """What an exception says, on one line, and its kind where that says more than the words."""
    words = " ".join(str(error).split())[:240]
    return words if words and not isinstance(error, LookupError | AttributeError | TypeError) else repr(error)[:240]


def check_features(builder: tfds.core.DatasetBuilder) -> None:
    """Raises ValueError if the set has no images or no labels."""
    info = builder.info
    missing = {"image", "label"} - set(info.features)
    if missing:
        raise ValueError(
            f"data set {info.full_name} has no feature {' or '.join(sorted(missing))} (it has "
            f"{', '.join(info.features)}): choose an image classification set in data.name"
        )


def _open_split(builder: tfds.core.DatasetBuilder, split: str, decoders: Mapping[str, Any] | None) -> Any:
    info = builder.info
    try:
        return builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"data set {info.full_name} is stored as {info.file_format.value}, which cannot be read at random: "
            "prepare it again with --file_format=array_record"
        ) from error
    except ValueError as error:
        sizes = ", ".join(f"{name} ({part.num_examples})" for name, part in info.splits.items())
        raise ValueError(
            f"data set {info.full_name} has no split {split!r}, or it is empty: choose one of {sizes} or a slice of one"
        ) from error
