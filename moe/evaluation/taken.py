"""The patches and tokens that each expert takes, as pictures and text coloured by expert."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from moe.evaluation.charts import data_uri
from moe.evaluation.examples import Examples
from moe.evaluation.page import colour, escape, legend

# Pixels along the longer side of a picture, tokens of a text, and experts in a legend, at most.
_SIDE, _TOKENS, _LEGEND = 160, 512, 32
# Up to so many patches across there is room for the experts' numbers.
_NUMBERED = 8


def pictures(examples: Examples, layers: Sequence[str], patch_size: int, class_token: bool) -> str:
    """Every image, a panel a layer; its patches in the colour of the expert of the largest weight."""
    images = [_normalise(image) for image in examples.batch["image"]]
    height, width = images[0].shape[:2]
    across = width // patch_size
    kept = [
        f'<image id="picture-{n}" width="{width}" height="{height}" href="{_uri(image)}"/>'
        for n, image in enumerate(images)
    ]
    defined = f'<svg width="0" height="0" style="position:absolute"><defs>{"".join(kept)}</defs></svg>'
    labels = examples.batch.get("label")
    panels = []
    for layer, name in enumerate(layers):
        figures = []
        for number in range(len(images)):
            first = 1 if class_token else 0
            expert, weight = examples.expert[layer, number, first:], examples.weight[layer, number, first:]
            marks = "".join(_patch(i, expert[i], weight[i], across, patch_size) for i in range(len(expert)))
            caption = "" if labels is None else f"<figcaption>label {int(labels[number])}</figcaption>"
            figures.append(
                f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="patches by expert">'
                f'<use href="#picture-{number}"/>{marks}</svg>{caption}</figure>'
            )
        panels.append(_panel(name, f'<div class="pictures">{"".join(figures)}</div>', examples.expert[layer]))
    return f"{defined}<div data-panels>{''.join(panels)}</div>"


def texts(examples: Examples, layers: Sequence[str], decode: Callable[[Sequence[int]], str]) -> str:
    """The beginning of every text, a panel a layer; its tokens in the colour of the expert of the largest weight."""
    rows = []
    for number, tokens in enumerate(examples.batch["tokens"]):
        length = min(int(np.sum(examples.batch["segment"][number] > 0)), _TOKENS)
        if length and examples.batch["mask"][number]:
            rows.append((number, pieces(tokens[:length].tolist(), decode)))
    panels = []
    for layer, name in enumerate(layers):
        blocks = []
        for number, words in rows:
            one = zip(words, examples.expert[layer, number], examples.weight[layer, number], strict=False)
            blocks.append(f'<div class="text">{"".join(_token(*each) for each in one)}</div>')
        panels.append(_panel(name, "".join(blocks), examples.expert[layer]))
    return f"<div data-panels>{''.join(panels)}</div>"


def pieces(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What each token adds to the text; ∎ for control tokens and for what completes a character."""
    words, text = [], ""
    for count in range(1, len(tokens) + 1):
        before, text = text, decode(tokens[:count])
        words.append(text[len(before) :] or "∎")
    return words


def _panel(name: str, inner: str, expert: Int[np.ndarray, "..."]) -> str:
    used = sorted(set(expert[..., 0].ravel().tolist()))
    more = [] if len(used) <= _LEGEND else [(f"and {len(used) - _LEGEND} more", "none")]
    entries = [(f"expert {one}", colour(one)) for one in used[:_LEGEND]]
    return f'<div data-panel="{escape(name)}">{inner}{legend([*entries, *more])}</div>'


def _patch(index: int, expert_K: Int[np.ndarray, "K"], weight_K: Float[np.ndarray, "K"], across: int, size: int) -> str:
    x, y = index % across * size, index // across * size
    first = int(expert_K[0])
    title = f"<title>{escape(_choices(expert_K, weight_K))}</title>"
    if weight_K[0] <= 0:
        return f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="none">{title}</rect>'
    number = ""
    if across <= _NUMBERED:
        place = f'x="{x + 0.08 * size:.2f}" y="{y + 0.42 * size:.2f}" style="font-size:{0.4 * size:.2f}px"'
        number = f"<text {place}>{first}</text>"
    box = (
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{colour(first)}" fill-opacity=".5">{title}</rect>'
    )
    return box + number


def _token(text: str, expert_K: Int[np.ndarray, "K"], weight_K: Float[np.ndarray, "K"]) -> str:
    shown = escape(text.replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "→\t"))
    if weight_K[0] <= 0:
        return f'<span title="no expert" style="border-color:transparent">{shown}</span>'
    shade = colour(int(expert_K[0]))
    title = escape(_choices(expert_K, weight_K))
    return f'<span title="{title}" style="border-color:{shade};background:{shade}38">{shown}</span>'


def _choices(expert_K: Int[np.ndarray, "K"], weight_K: Float[np.ndarray, "K"]) -> str:
    """expert 3 (.62), 5 (.38)."""
    parts = [f"{expert} ({weight:.2f})" for expert, weight in zip(expert_K, weight_K, strict=True) if weight > 0]
    return f"expert {', '.join(parts)}" if parts else "no expert"


def _normalise(image: Float[np.ndarray, "h w c"]) -> np.ndarray:
    """Bytes, from the darkest to the brightest."""
    low, high = float(image.min()), float(image.max())
    return ((image - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)


def _uri(image: np.ndarray) -> str:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image[..., :3])
    picture.thumbnail((_SIDE, _SIDE))
    return data_uri(picture)
