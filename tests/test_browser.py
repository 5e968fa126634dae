"""The pages in headless Chromium: `make test-browser`. Nothing asked of a network, no error, readable on a phone."""

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.compare.page import html_page
from moe.evaluation.examples import Examples
from moe.evaluation.report import report_page
from tests.evaluation.test_report import ROUTING, make_batch, make_workdir
from tests.test_compare import make_run

pytestmark = pytest.mark.browser
PHONE, DESK = 360, 1200


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Chromium of the machine, or playwright's own."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright isn't installed: pip install 'moe-jax[browser]'")
    from playwright.sync_api import Error, sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"there is no Chromium here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(chromium: Any, file: Path, width: int, scheme: str = "light") -> Iterator[Any]:
    """The page in a window of that width; in the end it must have said nothing and asked for nothing."""
    said: list[str] = []
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else 0
    )
    page.goto(file.as_uri())
    yield page
    context.close()
    assert said == []


@pytest.fixture(scope="module", params=["report of images", "report of text", "comparison"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    path = folder / "page.html"
    if request.param == "comparison":
        import compare

        runs = [make_run(folder / f"{k}-{seed}", f"seed={seed}", f"router.k={k}") for k in (1, 2) for seed in (0, 1)]
        path.write_text(html_page(compare.compare_runs(runs)))
        return path
    kind, name = ("vit", "digits") if request.param == "report of images" else ("lm", "stdlib_lm")
    config = make_workdir(folder, name, *(["model.patch_size=4"] if kind == "vit" else ["model.depth=2"]))
    length = 4 if kind == "vit" else 8
    expert = np.random.default_rng(0).integers(0, 8, (2, 8, length, 2)).astype(np.int32)
    examples = Examples(make_batch(kind), expert, np.ones(expert.shape, np.float32))
    # Both pages that there are: with the routing of the test set, and with a sentence in its place.
    path.write_text(report_page(config, folder, examples, routing=ROUTING if kind == "vit" else None))
    return path


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_stands_out_of_the_window(chromium: Any, file: Path, width: int) -> None:
    with opened(chromium, file, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        small = "e => e.filter(x => x.textContent.trim() && parseFloat(getComputedStyle(x).fontSize) < 12).length"
        assert page.eval_on_selector_all("p, td, th, figcaption, button, .legend, .text span", small) == 0
        assert page.eval_on_selector_all(
            "svg[viewBox]", "e => e.filter(x => x.getBoundingClientRect().width > 0).length"
        )


def luminance(color: str) -> float:
    """Of rgb(…), by WCAG 2."""
    parts = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_ground_in_both_schemes(chromium: Any, file: Path, scheme: str) -> None:
    with opened(chromium, file, PHONE, scheme) as page:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (luminance(ground) < 0.1) == (scheme == "dark")
        for what in ("body", "p", "td", "svg text"):
            property = "fill" if what == "svg text" else "color"
            color = page.eval_on_selector(what, f"e => getComputedStyle(e).{property}")
            low, high = sorted((luminance(ground), luminance(color)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{what}: {color} on {ground}"


def test_a_curve_says_its_values_under_the_pointer(chromium: Any, file: Path) -> None:
    with opened(chromium, file, DESK) as page:
        figure = page.locator("figure[data-series]").first
        series = json.loads(figure.get_attribute("data-series"))["series"]
        figure.locator("svg").hover()
        read = figure.locator(".read").inner_text()
        assert read.startswith("step ")
        assert all(name in read for name, _, _ in series)


def test_layers_are_looked_at_one_by_one_and_load_over_time(
    chromium: Any, file: Path, request: pytest.FixtureRequest
) -> None:
    if "comparison" in request.node.name:
        return
    with opened(chromium, file, PHONE) as page:
        first, second = page.locator("[data-panel]").all()
        assert (first.is_visible(), second.is_visible()) == (True, False)
        page.locator(".tabs button").nth(1).click()
        assert (first.is_visible(), second.is_visible()) == (False, True)
        pixel = "c => c.toDataURL()"
        canvas, slider = page.locator("canvas"), page.locator("input[type=range]")
        assert page.locator("[data-heat] .read").inner_text() == "step 2"
        last = canvas.evaluate(pixel)
        slider.fill("0")
        assert page.locator("[data-heat] .read").inner_text() == "step 1"
        assert canvas.evaluate(pixel) != last
