"""A browser for the tests of a page."""

from __future__ import annotations

import pytest

from tests.local_pages import CHROMIUM


@pytest.fixture(scope="module")  # its event loop counts as running, and other tests start one
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()
