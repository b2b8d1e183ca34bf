"""The report in headless Chromium: phone and desktop, light, dark and print. Skipped where there is no browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.report.page import write_report
from tests.align.report.test_benchmarks import JUDGED, PAIRS, TASKS
from tests.run_folder import fake_run, write

WIDE_PARTS = """() => {
    const folded = e => { const d = e.closest("details:not([open])"); return d && !e.closest("summary"); };
    return [...document.querySelectorAll("body *")].filter(e => !folded(e) && !e.closest("svg"))
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && e.getClientRects().length)
        .map(e => e.tagName + "." + e.className + ": " + e.textContent.slice(0, 40));
}"""
CONTRAST = """() => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    const says = e => e.textContent.trim() && (!e.closest("svg") || e.tagName === "text");
    const worst = [...document.querySelectorAll("main *")].filter(says).map(e => {
        const style = getComputedStyle(e), ink = light(e.closest("svg") ? style.fill : style.color);
        return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05); });
    return Math.min(...worst);
}"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run with hostile texts, and one that was killed."""
    hostile = "</script><script>fetch('http://example.com')</script><img src=//example.com/x onerror=alert(1)>"
    names = {"whole": "done", "killed": "running"}
    found = {}
    for name, status in names.items():
        run = fake_run(tmp_path_factory.mktemp(name))
        texts = ("w" * 10_000, hostile, "\u202e\u05e9\u05dc\u05d5\u05dd \u0000 &amp;", "")
        replies = {f"stage_{i}": {"text": text, "reward": -1.0, "gold": 1.0} for i, text in enumerate(texts)}
        write(run / "evaluate" / "samples.jsonl", [{"prompt": hostile, "id": "x", "replies": replies}] * 3)
        result = json.loads((run / "evaluate" / "result.json").read_text(encoding="utf-8"))
        write(run / "evaluate" / "result.json", {**result, "tasks": TASKS, "judged": JUDGED, "pairs": PAIRS})
        record = (run / "run.json").read_text(encoding="utf-8")
        (run / "run.json").write_text(record.replace('"status": "done"', f'"status": "{status}"', 1), encoding="utf-8")
        found[name] = write_report(run)
    return found


@pytest.mark.parametrize("name", ["whole", "killed"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_fits_and_asks_for_nothing(
    browser: Any, reports: dict[str, Path], name: str, scheme: str, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(reports[name].as_uri())
    assert asked == [reports[name].as_uri()] and said == []
    assert page.evaluate(WIDE_PARTS) == []
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) >= 4.5  # WCAG AA for text of this size
    unnamed = "[...document.querySelectorAll('svg')].filter(e => !e.querySelector(':scope > title')).length"
    unscoped = "[...document.querySelectorAll('th')].filter(e => !e.scope).length"
    assert page.evaluate(unnamed) == page.evaluate(unscoped) == 0
    page.close()


def test_the_page_prints_whole(browser: Any, reports: dict[str, Path], tmp_path: Path) -> None:
    """On A4 nothing is wider than the sheet, in dark mode neither, and closed folds leave no empty section."""
    page = browser.new_page(viewport={"width": 660, "height": 1000}, color_scheme="dark")
    page.goto(reports["whole"].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate(WIDE_PARTS) == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4", prefer_css_page_size=True)[:5] == b"%PDF-"
    page.close()
