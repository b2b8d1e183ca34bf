"""A server of OpenAI's protocol in threads of this process, and requests to it."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from contextlib import contextmanager
from types import SimpleNamespace

from align.serving.engine import Engine
from align.serving.local_page import HOST, Server, listen
from align.serving.openai_api import Api
from align.serving.options import ServeOptions

QUESTION = [{"role": "user", "content": "say owl"}]


@contextmanager
def serving(served, **options):
    """A server in threads of this process."""
    options = ServeOptions(port=0, **options)
    engine = Engine(served, options.batch, options.waiting)
    with listen("0", options.host) as found:
        api = Api(served, engine, options)
        server, port = Server(api), found.getsockname()[1]
        threads = [threading.Thread(target=server.run, kwargs={"sockets": [found]})]
        engine.start()
        threads[0].start()
        try:
            yield SimpleNamespace(port=port, engine=engine, served=served, api=api)
        finally:
            server.handle_exit(signal.SIGINT, None)
            threads[0].join(240)
            engine.stop()
            assert not threads[0].is_alive()


def ask(here, path, body=None, method=None, **headers):
    """(status, JSON or text) of a request."""
    connection = http.client.HTTPConnection(HOST, here.port, timeout=240)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.putrequest(method or ("GET" if body is None else "POST"), path, skip_host="Host" in headers)
    for name, value in {**headers, "Content-Length": len(raw or b"")}.items():
        connection.putheader(name, str(value))
    connection.endheaders(raw)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    kind = answer.getheader("content-type") or ""
    return answer.status, json.loads(text) if "json" in kind else text


def chat(here, model="ppo", **more):
    status, answer = ask(here, "/v1/chat/completions", {"model": model, "messages": QUESTION, **more})
    assert status == 200, answer
    return answer
