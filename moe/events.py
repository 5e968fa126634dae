"""What TensorBoard shows of the experts' load at a log point: a histogram a layer, and a picture of all layers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

from moe.evaluation.charts import heat_picture, png

_BUCKETS = 24
# Pixels along a side of the picture, at most; a cell has a side of up to 16 of them.
_SIDE = 512


def load_summaries(load: Mapping[str, Any]) -> list[Summary.Value]:
    """Of shares of the experts in the rows, by layer: moe/LAYER/load_to_mean, and the picture moe/load_to_mean.

    A load over the mean load is 1 at balance. In the picture a layer is a row, the first on top, an expert a column; it
    goes from violet, 0, to yellow, 3 and more.
    """
    ratios = {name: np.nan_to_num(np.asarray(shares, np.float64)) * len(shares) for name, shares in load.items()}
    values = [Summary.Value(tag=f"moe/{name}/load_to_mean", histo=_histogram(one)) for name, one in ratios.items()]
    grid = np.stack(list(ratios.values()))
    picture = heat_picture(grid, cell=max(1, min(16, _SIDE // max(grid.shape))))
    image = Summary.Image(height=picture.height, width=picture.width, colorspace=3, encoded_image_string=png(picture))
    return [*values, Summary.Value(tag="moe/load_to_mean", image=image)]


def _histogram(values: np.ndarray) -> HistogramProto:
    """Even buckets from 0 to the largest value."""
    counts, edges = np.histogram(values, _BUCKETS, (0.0, max(float(values.max()), 1e-9)))
    return HistogramProto(
        min=values.min(),
        max=values.max(),
        num=len(values),
        sum=values.sum(),
        sum_squares=np.square(values).sum(),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )
