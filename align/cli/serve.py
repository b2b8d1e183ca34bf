"""`align serve`: the policies of runs for programs that speak OpenAI's protocol."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from align.cli.arguments import extra, read_options, say, split_words
from align.serving.options import By, ServeOptions
from data_prep.core.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost")


def serve(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Serve the targets until Ctrl-C, or say how vLLM can."""
    targets, words = split_words(args.words, len(args.words))
    if not targets:
        raise UserError("serve needs a TARGET: a path, RUN or RUN/STAGE", code="no_target")
    if args.config_dir:
        raise UserError("serve takes no recipes", field="--config-dir", code="bad_flag")
    options = read_options(ServeOptions, words)
    options = replace(options, token=args.token) if args.token is not None else options
    if options.token is not None and (not options.token.strip() or not options.token.isascii()):
        raise UserError("empty, or not ASCII", field="token", code="bad_value")
    if options.engine is By.vllm:
        return _by_vllm(args, targets, options)
    if options.host not in LOOPBACK and options.token is None:
        raise UserError(
            f"listening on {options.host} lets other computers ask: that needs a token",
            field="host",
            hint="add --token TOKEN; clients send it as their API key",
            code="no_token",
        )
    if args.json:
        raise UserError("a server gives no JSON of its own", field="--json", hint="leave it out", code="bad_flag")
    return _serve(targets, options, args.port), {}


def _serve(targets: list[str], options: ServeOptions, port: str | None) -> int:
    """On a port, which is taken before any weight loads."""
    with extra("chat"):
        from align.serving.local_page import listen, serve

    with listen(port or str(options.port), options.host) as found:
        from align.serving.engine import Engine
        from align.serving.openai_api import Api
        from align.serving.served import Served, speakers_of

        speakers = []
        for target in targets:
            policies, notes = speakers_of(target, options.out)
            speakers += policies
            for note in notes:
                print(f"align: {note}", file=sys.stderr)
        served = Served(speakers, options)
        engine = Engine(served, options.batch, options.waiting)
        engine.start()
        print(f"http://{options.host}:{found.getsockname()[1]}/v1: {', '.join(served.models)}", flush=True)
        print("Ctrl-C stops the server", file=sys.stderr)
        try:
            return serve(Api(served, engine, options), found)
        finally:
            engine.stop()


def _by_vllm(args: argparse.Namespace, targets: list[str], options: ServeOptions) -> tuple[int, dict[str, Any]]:
    """The commands that let vLLM serve."""
    from align.weights.vllm import commands

    answer = commands(targets, options.out, options.base)
    for name, problem in answer["refused"].items():
        print(f"align: {name} is left out: {problem}", file=sys.stderr)
    say(args, *answer["commands"])
    return 0, answer
