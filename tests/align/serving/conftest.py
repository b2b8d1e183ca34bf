"""Pages that are opened in the browser."""

from __future__ import annotations

import pytest


@pytest.fixture
def opened(browser, served):
    """Opens the page of the module's `served`; at the end it has asked nobody else and complained of nothing."""
    contexts, asked, complaints = [], [], []

    def open_page(width=1280, height=800, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(served.address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked and all(url.startswith((served.url, "data:")) for url in asked) and complaints == []
