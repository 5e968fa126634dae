"""What a model is trained and measured on: the data of each task, and the measures made of a model's scores."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe.data import pipeline
from moe.evaluation import classify
from moe.models import ViTConfig


class Task(NamedTuple):
    """The data and measures of one kind of model; `config.model.task` names it.

    check_data(data, model): raises ValueError if the data of a config don't fit its model.
    make_train_iterator, make_eval_batches: as in `moe.data.pipeline`.
    evaluate(predict, variables, batches): measures by name, of what `Model.score` returns for every batch.
    """

    check_data: Callable[[Any, Any], None]
    make_train_iterator: Callable[..., Any]
    make_eval_batches: Callable[..., Any]
    evaluate: Callable[..., dict[str, float]]


def check_images(data: pipeline.DataConfig, model: ViTConfig) -> None:
    """Raises ValueError if the images or their classes don't fit the model."""
    info = pipeline.inspect_data(data)
    if info.classes != model.num_classes or info.image_shape != tuple(model.image_size):
        raise ValueError(
            f"data set {data.name} has {info.classes} classes and images of {info.image_shape}, but "
            f"model.num_classes = {model.num_classes} and model.image_size = {model.image_size}."
        )


TASKS: Mapping[str, Task] = {
    "image": Task(check_images, pipeline.make_train_iterator, pipeline.make_eval_batches, classify.evaluate),
}
