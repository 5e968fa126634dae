"""Charts of the pages that runs write, as SVG and small PNG in the page itself."""

import base64
import functools
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from moe.evaluation.page import colour, data, escape, legend

# More points than a line has pixels, or a heat map columns, are thinned out.
_POINTS, _COLUMNS = 300, 200
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 210, 48, 390, 8, 185
# From little to much: viridis (matplotlib, CC0), which reads in grey and with colour-blindness as well.
_SHADES = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
# Load over the mean load at the end of the scale; 1 is balance.
HOTTEST = 3.0


class Series(NamedTuple):
    """A line: y over x, in the colour of that number; faint ones stand behind, without a place in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False


def line_chart(title: str, series: Sequence[Series], along: str = "step") -> str:
    """A figure of lines, which says the values under the pointer; "" where there is nothing to show.

    along: what lies on the horizontal axis.
    """
    lines = [one for one in map(_finite, series) if len(one.x)]
    if not lines:
        return ""
    xs, ys = [x for one in lines for x in one.x], [y for one in lines for y in one.y]
    low_x, high_x = min(xs), max(xs)
    ticks = nice_ticks(min(ys), max(ys))
    scale_x, scale_y = Scale(low_x, high_x, _LEFT, _RIGHT), Scale(ticks[0], ticks[-1], _BOTTOM, _TOP)
    paths = "".join(_path(one, scale_x, scale_y) for one in sorted(lines, key=lambda one: not one.faint))
    read = [[one.name, list(one.x), list(one.y)] for one in lines if not one.faint]
    values = data({"series": read, "box": [_LEFT, _RIGHT], "x": [low_x, high_x], "along": along})
    return (
        f'<figure data-series="{values}"><b>{escape(title)}</b>{_svg(title, _grid(scale_x, scale_y, ticks) + paths)}'
        f'<div class="read"></div>{legend((s.name, colour(s.colour)) for s in lines if not s.faint)}</figure>'
    )


class Dots(NamedTuple):
    """A row of a dot chart: its values, their mean, and the standard error of that (NaN: none)."""

    name: str
    values: Sequence[float]
    mean: float
    error: float
    colour: int = 0


def dot_chart(title: str, rows: Sequence[Dots]) -> str:
    """A figure with a row for each group: a dot a seed, a bar for the mean, and its standard error."""
    ends = [end for row in rows for end in (*row.values, row.mean - _or_0(row.error), row.mean + _or_0(row.error))]
    if not ends or not all(map(math.isfinite, ends)):
        return ""
    ticks = nice_ticks(min(ends), max(ends), most=4)
    bottom = 44 * len(rows)
    scale = Scale(ticks[0], ticks[-1], 14, _RIGHT - 14)
    marks = []
    for index, row in enumerate(rows):
        y, shade = 44 * index + 28, colour(row.colour)
        marks.append(f'<text x="2" y="{y - 14}">{escape(row.name)}</text>')
        marks += [f'<circle cx="{scale(v):.1f}" cy="{y}" r="4" fill="{shade}" fill-opacity=".45"/>' for v in row.values]
        x, half = scale(row.mean), scale(row.mean + _or_0(row.error)) - scale(row.mean)
        cross = f"M{x:.1f} {y - 9}V{y + 9}M{x - half:.1f} {y}H{x + half:.1f}"
        marks.append(f'<path d="{cross}" stroke="{shade}" stroke-width="2.5"/>')
    axis = "".join(
        f'<line class="axis" x1="{scale(t):.1f}" x2="{scale(t):.1f}" y1="0" y2="{bottom}"/>'
        f'<text x="{scale(t):.1f}" y="{bottom + 15}" text-anchor="middle">{number(t)}</text>'
        for t in ticks
    )
    return f"<figure><b>{escape(title)}</b>{_svg(title, axis + ''.join(marks), bottom + 22)}</figure>"


class Scale(NamedTuple):
    """From values to places: `low` lies at `start` and `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where the value lies."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers at even distances, from at or below `low` to at or above `high`."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        half = abs(low) / 2 or 0.5
        low, high = (0.0, 1.0) if low == 0 else (low - half, high + half)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number as an axis shows it."""
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def thin(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, evenly, the last one among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


@functools.cache
def shades() -> list[list[int]]:
    """The 256 colours of the heat maps, red, green and blue, from 0 to `HOTTEST`."""
    anchors = np.array([[int(shade[i : i + 2], 16) for i in (0, 2, 4)] for shade in _SHADES], float)
    at = np.linspace(0, len(anchors) - 1, 256)
    return (
        np.stack([np.interp(at, range(len(anchors)), anchors[:, c]) for c in range(3)], 1).round().astype(int).tolist()
    )


def heat_levels(load: Float[np.ndarray, "..."]) -> np.ndarray:
    """The number of each load's shade; loads are over the mean load."""
    return np.clip(np.nan_to_num(load) / HOTTEST * 255, 0, 255).astype(np.uint8)


def heat_picture(load: Float[np.ndarray, "H W"], cell: int = 1) -> Image.Image:
    """The picture of loads over the mean load, `cell` pixels for each."""
    picture = Image.fromarray(np.array(shades(), np.uint8)[heat_levels(load)])
    return picture.resize((picture.width * cell, picture.height * cell), Image.Resampling.NEAREST)


def png(picture: Image.Image) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(picture: Image.Image) -> str:
    """The picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def heat_strip(title: str, steps: Sequence[int], load: Float[np.ndarray, "S E"]) -> str:
    """A figure of one layer: a row for each expert, a column for each log point."""
    keep = thin(len(steps), _COLUMNS)
    experts = load.shape[1]
    rows = max(48, min(8 * experts, 220))
    picture = data_uri(heat_picture(load[keep].T))
    what = f"{title}: load of experts 0 to {experts - 1}, top to bottom, from step {steps[0]} to {steps[-1]}"
    return (
        f'<figure><b>{escape(title)}</b><img class="heat" style="height:{rows}px" alt="{escape(what)}" src="{picture}">'
        f"<figcaption>steps {steps[0]} to {steps[-1]}; experts 0 to {experts - 1}, top to bottom</figcaption></figure>"
    )


def heat_square(title: str, cosine: Float[np.ndarray, "E E"]) -> str:
    """A figure of experts × experts, from 0 (and what is below) to 1."""
    what = f"experts 0 to {len(cosine) - 1} in both directions; dark is 0, bright is 1"
    picture = data_uri(heat_picture(cosine * HOTTEST))
    return (
        f'<figure><b>{escape(title)}</b><img class="heat" style="aspect-ratio:1;max-width:14rem" '
        f'alt="{escape(f"{title}: {what}")}" src="{picture}"><figcaption>{escape(what)}</figcaption></figure>'
    )


def heat_slider(steps: Sequence[int], load: Float[np.ndarray, "S N E"], names: Sequence[str]) -> str:
    """A figure of all layers, a row for each, and a slider over the log points."""
    keep = thin(len(steps), _COLUMNS if load[0].size <= 1024 else 20)
    levels = base64.b64encode(heat_levels(load[keep]).tobytes()).decode()
    values: dict[str, Any] = {"steps": [steps[index] for index in keep], "colours": shades(), "values": levels}
    values |= {"layers": load.shape[1], "experts": load.shape[2]}
    height = max(40, min(28 * load.shape[1], 400))
    return (
        f'<figure data-heat="{data(values)}"><b>Load of layers × experts</b>'
        f'<canvas class="heat" style="height:{height}px" role="img" aria-label="load of every expert of every layer">'
        '</canvas><input type="range" min="0" aria-label="log point"><div class="read"></div>'
        f"<figcaption>top to bottom: {escape(', '.join(names))}; left to right: experts 0 to {load.shape[2] - 1}"
        "</figcaption></figure>"
    )


def heat_scale() -> str:
    """What the shades of heat maps mean."""
    stops = ", ".join(f"#{shade}" for shade in _SHADES)
    return (
        f'<div style="height:.6rem;border-radius:.3rem;background:linear-gradient(90deg, {stops})"></div>'
        '<div style="display:flex;justify-content:space-between;font-size:.85rem;color:var(--soft)">'
        f"<span>0: no token</span><span>1: an even share</span><span>2</span><span>{HOTTEST:g} or more</span></div>"
    )


def _or_0(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _finite(series: Series) -> Series:
    """The points that can be drawn, thinned out."""
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    points = [points[index] for index in thin(len(points), _POINTS)]
    return series._replace(x=[float(x) for x, _ in points], y=[float(f"{y:.5g}") for _, y in points])


def _path(series: Series, scale_x: Scale, scale_y: Scale) -> str:
    places = [f"{scale_x(x):.1f} {scale_y(y):.1f}" for x, y in zip(series.x, series.y, strict=True)]
    width = '1" stroke-opacity=".35' if series.faint else "2"
    # A line of one point needs some length to be seen.
    line = f"M{'L'.join(places)}" + ("h3" if len(places) == 1 else "")
    look = f'fill="none" stroke="{colour(series.colour)}" stroke-width="{width}" stroke-linejoin="round"'
    return f'<path d="{line}" {look}/>'


def _grid(scale_x: Scale, scale_y: Scale, ticks: Sequence[float]) -> str:
    parts = [
        f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{scale_y(t):.1f}" y2="{scale_y(t):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{scale_y(t) + 4:.1f}" text-anchor="end">{number(t)}</text>'
        for t in ticks
    ]
    inside = [t for t in nice_ticks(scale_x.low, scale_x.high, 4) if scale_x.low <= t <= scale_x.high] or [scale_x.low]
    parts += [f'<text x="{scale_x(t):.1f}" y="{_BOTTOM + 17}" text-anchor="middle">{number(t)}</text>' for t in inside]
    parts.append(f'<line class="axis mark" y1="{_TOP}" y2="{_BOTTOM}" x1="0" x2="0" visibility="hidden"/>')
    return "".join(parts)


def _svg(title: str, inner: str, height: int = _HEIGHT) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{inner}</svg>'
