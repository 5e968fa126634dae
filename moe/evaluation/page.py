"""The shell of the pages that runs write: one file that asks nothing of a network, for phones and for the dark too."""

import colorsys
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Colours of lines and experts; the further ones are made of these by `colour`. Told apart by most people with
# colour-blindness, against white and against black (Okabe and Ito's, a little darker where they are too bright).
_HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8b5cf6", "#7f7f7f")

# `default-src 'none'`: the browser itself refuses whatever would go over the network.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark;
  --back: #ffffff; --front: #1b1f24; --soft: #5b6570; --line: #d5dae0; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0f1216; --front: #e6e9ed; --soft: #9aa5b1; --line: #313841; --card: #181c22; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--back); color: var(--front);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { color: var(--soft); margin: .25rem 0 .75rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.wrap { white-space: normal; min-width: min(16rem, 45vw); } th { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .75rem; }
.scroll + .charts { margin-top: .75rem; }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; min-width: 0; }
figure > b { display: block; }
svg { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
svg text { fill: var(--soft); font-size: 11px; } .axis { stroke: var(--line); stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .35em; }
.read { min-height: 1.4em; font-size: .85rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.heat { width: 100%; image-rendering: pixelated; display: block; border-radius: .25rem; }
input[type=range] { width: 100%; }
.tabs { display: flex; flex-wrap: wrap; gap: .35rem; margin: .5rem 0; }
.tabs button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem; padding: .2rem .7rem; min-height: 2.2rem; cursor: pointer; }
.tabs button[aria-pressed=true] { border-color: currentColor; font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; }
.pictures svg { image-rendering: pixelated; }
.pictures svg text { fill: #fff; stroke: #000; stroke-width: .02px; }
.text { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; padding: .75rem; background: var(--card);
  border-radius: .5rem; margin: 0 0 .75rem; }
.text span { border-bottom: 3px solid; border-radius: 2px; }
pre { overflow-x: auto; background: var(--card); padding: .75rem; border-radius: .5rem; font-size: .85rem; }
summary { cursor: pointer; min-height: 2rem; }
"""

_SCRIPT = """
const all = (what, root = document) => [...root.querySelectorAll(what)];
const short = v => Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4));
for (const figure of all('figure[data-series]')) {
  const {series, box, x, along} = JSON.parse(figure.dataset.series), svg = figure.querySelector('svg');
  const mark = svg.querySelector('.mark'), read = figure.querySelector('.read');
  svg.addEventListener('pointermove', event => {
    const frame = svg.getBoundingClientRect();
    const at = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
    const wanted = x[0] + (at - box[0]) / (box[1] - box[0]) * (x[1] - x[0]);
    const values = series.map(([name, xs, ys]) => {
      let best = 0;
      xs.forEach((v, i) => { if (Math.abs(v - wanted) < Math.abs(xs[best] - wanted)) best = i; });
      return [name, xs[best], ys[best]];
    });
    if (!values.length) return;
    const place = box[0] + (values[0][1] - x[0]) / (x[1] - x[0] || 1) * (box[1] - box[0]);
    mark.setAttribute('x1', place); mark.setAttribute('x2', place); mark.setAttribute('visibility', 'visible');
    const texts = values.map(([name, , y]) => name + ' ' + short(y));
    read.textContent = along + ' ' + values[0][1] + ': ' + texts.join(', ');
  });
}
for (const group of all('[data-panels]')) {
  const panels = all(':scope > [data-panel]', group), bar = document.createElement('div');
  bar.className = 'tabs';
  const show = chosen => panels.forEach((panel, i) => {
    panel.hidden = i !== chosen; bar.children[i].setAttribute('aria-pressed', i === chosen);
  });
  panels.forEach((panel, i) => {
    const button = document.createElement('button');
    button.textContent = panel.dataset.panel; button.onclick = () => show(i); bar.append(button);
  });
  group.prepend(bar); show(0);
}
for (const figure of all('figure[data-heat]')) {
  const {steps, layers, experts, colours, values} = JSON.parse(figure.dataset.heat);
  const [canvas, slider, read] = ['canvas', 'input', '.read'].map(what => figure.querySelector(what));
  const bytes = Uint8Array.from(atob(values), c => c.charCodeAt(0)), pen = canvas.getContext('2d');
  canvas.width = experts; canvas.height = layers; slider.max = steps.length - 1; slider.value = steps.length - 1;
  const draw = () => {
    const t = +slider.value, picture = pen.createImageData(experts, layers);
    for (let i = 0; i < layers * experts; i++) {
      picture.data.set([...colours[bytes[t * layers * experts + i]], 255], 4 * i);
    }
    pen.putImageData(picture, 0, 0); read.textContent = 'step ' + steps[t];
  };
  slider.oninput = draw; draw();
}
"""


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """A whole document of parts that are HTML already; title and subtitle are text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A heading, a note and what stands under it; nothing where there is nothing."""
    if not any(parts):
        return ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{paragraph(note)}\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str) -> str:
    """A text under a heading; nothing where there is none."""
    return f"<p>{escape(text)}</p>" if text else ""


def side_by_side(figures: Sequence[str]) -> str:
    """Figures in a grid, as many in a row as there is room for; nothing where there are none."""
    return f'<div class="charts">{"".join(figures)}</div>' if any(figures) else ""


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table of texts that scrolls by itself where it is too wide; long texts break."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    top = f"<thead><tr>{cells}</tr></thead>\n" if head else ""
    return f'<div class="scroll"><table>\n{top}<tbody>\n{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    text = str(value)
    return f"<td{' class=wrap' if len(text) > 24 else ''}>{escape(text)}</td>"


def facts(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    return table((), values.items())


def details(summary: str, text: str) -> str:
    """A text in its own lines that is folded away."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Names and colours."""
    marks = (f'<span><i style="background:{shade}"></i>{escape(name)}</span>' for name, shade in entries)
    return f'<div class="legend">{"".join(marks)}</div>'


def colour(index: int) -> str:
    """The colour of the line or expert of that number, #rrggbb: eight are fixed, the others go around the hues."""
    if index < len(_HUES):
        return _HUES[index]
    channels = colorsys.hls_to_rgb(index * 137.508 / 360 % 1, 0.42 + 0.08 * (index % 3), 0.6 + 0.2 * (index % 2))
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def data(value: Any) -> str:
    """JSON as the value of an attribute in double quotes."""
    return escape(json.dumps(value, separators=(",", ":")))


def escape(text: Any) -> str:
    """Text as HTML, in attributes too; what no document may hold, control characters and halves of pairs, as U+FFFD."""
    clean = "".join(
        "\ufffd" if (ord(c) < 32 and c not in "\n\t\r") or 0xD800 <= ord(c) < 0xE000 else c for c in str(text)
    )
    return html.escape(clean)
