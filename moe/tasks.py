"""What a model is trained and measured on: the data of each task, and the measures made of a model's scores."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe.data import pipeline, text
from moe.evaluation import classify, language
from moe.layers.moe import MoeConfig
from moe.models import LmConfig, ModelConfig, ViTConfig
from moe.parallel import hosts
from moe.routers import ROUTERS, Router
from moe.routers.causality import sees_later_tokens


class Task(NamedTuple):
    """The data and measures of one kind of model; `config.model.task` names it.

    data: the class of the config's table `data`.
    check_data(data, model): what a result depends on besides the config, to be recorded with it, by name; raises
        ValueError if the data of a config don't fit its model.
    make_train_iterator, make_eval_batches: as in `moe.data.pipeline`.
    evaluate(predict, variables, batches): measures by name, of what `Model.score` returns for every batch.
    name_example(data, index): what messages call an example of the training sequence, see `TrainIterator.indices`.
    """

    data: type
    check_data: Callable[[Any, Any], dict[str, str]]
    make_train_iterator: Callable[..., Any]
    make_eval_batches: Callable[..., Any]
    evaluate: Callable[..., dict[str, float]]
    name_example: Callable[[Any, Any], str]


def check_images(data: pipeline.DataConfig, model: ViTConfig) -> dict[str, str]:
    """Nothing to record; says what examples are skipped, of those that are looked at (`pipeline.check_labels`).

    Raises ValueError if the images or their classes don't fit the model, OSError if an example can't be used and is not
    to be skipped.
    """
    info = pipeline.inspect_data(data)
    if info.classes != model.num_classes or info.image_shape != tuple(model.image_size):
        raise ValueError(
            f"data set {data.name} has {info.classes} classes and images of {info.image_shape}, but "
            f"model.num_classes = {model.num_classes} and model.image_size = {model.image_size}."
        )
    hosts.say(*pipeline.check_labels(data))
    return {}


def check_text(data: text.TextConfig, model: LmConfig) -> dict[str, str]:
    """The manifest of every source, as "manifest/NAME".

    Raises ValueError if rows of text are longer than the model reads, or hold tokens that it doesn't know.
    """
    if data.length > model.length:
        raise ValueError(f"data.length = {data.length} tokens exceed model.length = {model.length}.")
    text.check_vocabulary(data, model.vocab_size)
    return {f"manifest/{name}": sha256 for name, sha256 in text.inspect_text(data).manifests.items()}


def shortage(data: pipeline.DataConfig | text.TextConfig, batch_size: int, processes: int) -> str:
    """A sentence on a training split that is smaller than a batch, or "".

    Raises ValueError if it has fewer examples than there are processes.
    """
    if isinstance(data, text.TextConfig):
        examples, name = text.inspect_text(data).train_examples, f"rows of {data.length} tokens"
        remedy = "more text or a smaller data.length"
    else:
        examples, name = pipeline.inspect_data(data).train_examples, "examples"
        remedy = "a larger data.train_split"
    if examples < processes:
        raise ValueError(
            f"data.train_split = {data.train_split!r} has {examples} {name}, fewer than the {processes} processes of "
            f"this run: choose {remedy}, or run fewer processes."
        )
    if examples < batch_size:
        return (
            f"data.train_split = {data.train_split!r} has {examples} {name}, fewer than a batch of {batch_size}: every "
            f"batch holds some of them more than once; choose {remedy}, or a smaller batch_size."
        )
    return ""


def caution(model: ModelConfig, moe: MoeConfig, router: Router) -> str:
    """A sentence on what a config makes of its measures that one might not expect, or ""."""
    if not isinstance(model, LmConfig) or not model.moe_every or not sees_later_tokens(router, moe.num_experts):
        return ""
    name = next(name for name, kind in ROUTERS.items() if type(router) is kind)
    return (
        f"router {name} chooses a token's experts by tokens that come after it: bits_per_byte and perplexity are lower "
        "than the next token can be predicted, and no text can be generated. Another router looks at each token alone."
    )


TASKS: Mapping[str, Task] = {
    "image": Task(
        pipeline.DataConfig,
        check_images,
        pipeline.make_train_iterator,
        pipeline.make_eval_batches,
        classify.evaluate,
        lambda data, index: f"{data.train_split}[{index}]",
    ),
    "text": Task(
        text.TextConfig,
        check_text,
        text.make_text_train_iterator,
        text.make_text_eval_batches,
        language.evaluate,
        lambda data, index: f"{data.sources[index[0]].name} epoch {index[1]} row {index[2]}",
    ),
}
