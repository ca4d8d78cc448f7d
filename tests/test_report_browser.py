"""The report in a browser: nothing is too wide or fails, and it prints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from crysdistill.studies.collect import report_study
from tests.synthetic_study import write_study

pytestmark = pytest.mark.slow

SCREENS = {"desktop": (1280, 900, "light"), "phone": (390, 844, "dark")}
TOO_WIDE = """() => {
  const wide = document.documentElement.clientWidth;
  const inside = e => e.closest('.scroll') !== null;
  return [...document.querySelectorAll('body *')]
    .filter(e => !inside(e) && e.getBoundingClientRect().right > wide + 1)
    .map(e => e.tagName + ': ' + e.textContent.trim().slice(0, 40));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="no browser: `pip install playwright`"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(
                executable_path=path, args=["--no-sandbox"]
            )
        except api.Error:
            pytest.skip("no browser: `apt-get install chromium`")
        yield found
        found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("study") / "study"
    write_study(folder, frozen=[0, 1, "all"], failed=1)
    return report_study(folder).resolve().as_uri()


@pytest.mark.parametrize("screen", SCREENS)
def test_fits_the_screen(browser, page, screen, tmp_path):
    width, height, scheme = SCREENS[screen]
    view = {"width": width, "height": height}
    shown = browser.new_page(viewport=view, color_scheme=scheme)
    wrong: list[str] = []
    shown.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("request", lambda r: wrong.append(r.url) if r.url != page else None)
    shown.goto(page)
    shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    picture = tmp_path / f"{screen}.png"
    shown.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000
    assert wrong == []
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert shown.evaluate(TOO_WIDE) == []
    background = "getComputedStyle(document.body).backgroundColor"
    light = sum(map(int, shown.evaluate(background)[4:-1].split(","))) > 3 * 128
    assert light == (scheme == "light")
    shown.close()


def test_prints_on_paper_with_what_is_folded(browser, page, tmp_path):
    shown = browser.new_page()
    shown.goto(page)
    shown.emulate_media(media="print")
    hidden = (
        "[...document.querySelectorAll('details table')].filter(t => !t.offsetHeight)"
    )
    assert shown.evaluate(f"{hidden}.length") == 0
    content = shown.pdf(path=tmp_path / "report.pdf", format="A4")
    assert content.startswith(b"%PDF")
    shown.close()
