"""What the tests of the local pages share: requests as the page itself sends them, and a browser."""

from __future__ import annotations

import http.client
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser", "chrome"))), None)
HOSTILE = "<img src=x onerror=alert(1)><b>bold</b> &amp; <|end|>"


def ask(
    served: Any, path: str, body: bytes | None = None, method: str = "POST", **headers: Any
) -> tuple[int, dict[str, str], str]:
    """(status, headers, text) of a request; headers are those of the page itself unless given, None leaves one out."""
    host = served.url.removeprefix("http://").rstrip("/")
    own = {"Host": host, "X-Align-Token": served.page.token, "Origin": served.url[:-1]}
    given = {**own, **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection = http.client.HTTPConnection(host, timeout=240)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {**given, "Content-Length": len(body or b"")}.items():
        if value is not None:
            connection.putheader(name, str(value))
    connection.endheaders(body)
    answer = connection.getresponse()
    result = answer.status, dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return result


@contextmanager
def serving(page_at: Any) -> Iterator[SimpleNamespace]:
    """A page served from a thread: `page_at(port)` makes it. The namespace has page, port, url and address."""
    from align.serving.local_page import HOST, Server, listen

    with listen("0") as found:
        port = found.getsockname()[1]
        page = page_at(port)
        server = Server(page)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]})
        thread.start()
        try:
            yield SimpleNamespace(page=page, port=port, url=f"http://{HOST}:{port}/", address=page.address)
        finally:
            server.handle_exit(signal.SIGINT, None)
            thread.join(240)
            assert not thread.is_alive()
