"""How many photographs a second does one core turn into training images, and does another JPEG decoder help?

    python -m benchmarks.image_pipeline [--json FILE] [--markdown FILE] [--cpu-time] [--quick]

Photographs of 500×375 pixels and about 110 kB, as ImageNet's are on average: noise with the spectrum of natural images,
so that there is as much detail to decode. `steps`: what an image costs by step, one at a time on one core; ratio over
Pillow's plain decoding. simplejpeg, which wraps the same libjpeg-turbo, is there where it is installed. `pipeline`: the
whole of V-MoE's training transform (inception crop to 224, flip, RandAugment 2 × 10) from a tfds set on disk through
`moe.data.pipeline`, in images/s, by threads and by worker processes; ratio over no threads. With --cpu-time a second is
one of processor time, all threads together, so that the figure is per core; workers, whose time isn't seen, are left
out.
"""

import contextlib
import dataclasses
import functools
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks import common
from benchmarks.common import Row
from moe.data.augment import uniform
from moe.data.photo import PhotoConfig, central_crop, random_crop, sample_box
from moe.data.pipeline import DataConfig, make_train_iterator
from moe.data.randaugment import RandAugment, randaugment

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

WIDTH, HEIGHT, SIZE = 500, 375, 224
MIN_AREA, MAX_RATIO = 0.05, 4 / 3
BATCH = 64


def photograph(seed: int) -> bytes:
    """A JPEG of noise whose amplitude falls as frequency**-1.3, luminance and colour apart."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1
    spectrum = rng.normal(size=(3, 2, *frequency.shape)) * frequency**-1.3
    light, first, second = (
        plane / plane.std() for plane in np.fft.irfft2(spectrum[:, 0] + 1j * spectrum[:, 1], (HEIGHT, WIDTH))
    )
    colours = np.stack([light + 0.3 * first, light - 0.15 * (first + second), light + 0.3 * second], axis=-1)
    file = io.BytesIO()
    Image.fromarray(np.clip(128 + 45 * colours, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


class BenchmarkPhotographs(tfds.core.GeneratorBasedBuilder):
    """512 records of a few photographs, stored as tfds stores ImageNet."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        photographs = [photograph(seed) for seed in range(32)]
        for index in range(512):
            yield index, {"image": io.BytesIO(photographs[index % 32]), "label": index}


def steps(photographs: list[bytes]) -> dict[str, Callable[[], None]]:
    """What one after another does to each of the photographs."""
    draws = uniform(0, np.arange(len(photographs)), 12)

    def pillow(data: bytes, row: np.ndarray) -> None:
        Image.open(io.BytesIO(data)).load()

    def pillow_crop(data: bytes, row: np.ndarray) -> Image.Image:
        return random_crop(data, SIZE, row[:4], MIN_AREA, MAX_RATIO)

    def pillow_train(data: bytes, row: np.ndarray) -> None:
        np.asarray(randaugment(pillow_crop(data, row), row[4:].reshape(2, 4), 10.0))

    def evaluation(data: bytes, row: np.ndarray) -> None:
        np.asarray(central_crop(data, SIZE, 256))

    def simple(data: bytes, row: np.ndarray) -> np.ndarray:
        return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)

    def simple_crop(data: bytes, row: np.ndarray) -> Image.Image:
        left, top, width, height = sample_box(row[:4], WIDTH, HEIGHT, MIN_AREA, MAX_RATIO)
        part = np.ascontiguousarray(simple(data, row)[top : top + height, left : left + width])
        return Image.fromarray(part).resize((SIZE, SIZE), Image.Resampling.BILINEAR)

    def simple_train(data: bytes, row: np.ndarray) -> None:
        np.asarray(randaugment(simple_crop(data, row), row[4:].reshape(2, 4), 10.0))

    each: dict[str, Callable[[bytes, np.ndarray], Any]] = {
        "Pillow, decoded": pillow,
        "Pillow, random crop": pillow_crop,
        "Pillow, random crop, RandAugment": pillow_train,
        "Pillow, evaluation crop": evaluation,
    }
    if simplejpeg is not None:
        each |= {
            "simplejpeg, decoded": simple,
            "simplejpeg, random crop": simple_crop,
            "simplejpeg, random crop, RandAugment": simple_train,
        }

    def over_all(one: Callable[[bytes, np.ndarray], Any]) -> None:
        for data, row in zip(photographs, draws, strict=True):
            one(data, row)

    return {name: functools.partial(over_all, one) for name, one in each.items()}


def pipeline_rate(config: DataConfig, batches: int, clock: Callable[[], float]) -> float:
    """Images per second of the clock from the training iterator once it runs; the consumer does nothing."""
    iterator = make_train_iterator(config, BATCH, 0, 0, 1)
    ahead = 2 * config.prefetch * max(1, config.workers) + config.threads  # what may lie ready when the clock starts
    for _ in range(ahead):
        next(iterator)
    start = clock()
    for _ in range(batches):
        next(iterator)
    rate = batches * BATCH / (clock() - start)
    iterator.close()
    return rate


def main() -> None:
    """Steps in turns, then the pipeline, its settings in turns as well."""
    options = common.parser(__doc__)
    options.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = options.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    photographs = [photograph(seed) for seed in range(32)]
    size = sum(map(len, photographs)) / len(photographs) / 1000
    times = common.interleaved(steps(photographs), repeats=3 if arguments.quick else 15, clock=clock)
    baseline = times["Pillow, decoded"]
    rows = [
        Row(name=name, case="steps", value=value / len(photographs), unit="ms", ratio=value / baseline)
        for name, value in times.items()
    ]
    rows.append(Row(name="mean size of a photograph", case="steps", value=size, unit="kB", ratio=None))

    photo = PhotoConfig(min_area=MIN_AREA, flip=True, randaugment=RandAugment(layers=2), value_range=(-1.0, 1.0))
    settings = {
        "no threads": {"threads": 0},
        "1 thread": {"threads": 1},
        "2 threads": {"threads": 2},
        "4 threads": {"threads": 4},
        "1 worker": {"workers": 1},
        "2 workers": {"workers": 2},
    }
    if arguments.cpu_time:
        settings = {name: changes for name, changes in settings.items() if "workers" not in changes}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            BenchmarkPhotographs(data_dir=folder, file_format="array_record").download_and_prepare()
        config = DataConfig(name="benchmark_photographs", data_dir=folder, image_size=SIZE, photo=photo)
        rates: dict[str, list[float]] = {name: [] for name in settings}
        for _ in range(1 if arguments.quick else 3):
            for name, changes in settings.items():
                changed = dataclasses.replace(config, **changes)
                rates[name].append(pipeline_rate(changed, 8 if arguments.quick else 24, clock))
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    rows += [
        Row(name=name, case="pipeline", value=value, unit="images/s", ratio=value / medians["no threads"])
        for name, value in medians.items()
    ]
    common.report(rows, arguments)


if __name__ == "__main__":
    main()
