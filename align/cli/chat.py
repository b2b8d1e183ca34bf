"""`align chat`: talk to a checkpoint, in the terminal, from a pipe, or on a page of this computer's own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from shlex import quote
from typing import Any

from align.checkpoints.checkpoint import Checkpoint
from align.cli.arguments import extra, read_options, split_words
from align.run_record import is_run
from align.runs.folder import run_of
from align.serving.options import ChatOptions, find_policy, label_of
from data_prep.core.errors import UserError

INTERRUPTED = 130


def chat(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Find the policy, load it, and let the terminal, the pipe or the page do the talking."""
    targets, words = split_words(args.words, 1)
    if not targets:
        raise UserError("chat needs a TARGET: a path, RUN or RUN/STAGE", code="no_target")
    if args.config_dir:
        raise UserError("chat takes no recipes", field="--config-dir", code="bad_flag")
    options = read_options(ChatOptions, words)
    if args.port is not None and not args.web:
        raise UserError("a port is for the page", field="--port", hint="add --web", code="bad_flag")
    if args.json and args.web:
        raise UserError("the page gives no JSON", field="--json", hint="leave out --json or --web", code="bad_flag")
    piped = not sys.stdin.isatty()
    if args.json and not piped:
        hint = f"echo hello | align chat {quote(targets[0])} --json"
        raise UserError("reads its messages from a pipe", field="--json", hint=hint, code="bad_flag")
    checkpoint, notes = find_policy(targets[0], options.out)
    for note in notes:
        print(f"align: {note}", file=sys.stderr)
    try:
        if args.web:
            return _serve(checkpoint, options, args), {}
        return _talk(checkpoint, options, args, piped)
    except KeyboardInterrupt:
        print("align: interrupted", file=sys.stderr)
        return INTERRUPTED, {"error": UserError("interrupted", code="interrupted").as_dict()}


def _serve(checkpoint: Any, options: ChatOptions, args: argparse.Namespace) -> int:
    """On a page; the port is taken before any weight loads."""
    with extra("chat"):
        from align.serving.local_page import listen, serve
        from align.serving.web import Page
    from align.serving.conversation import Panel

    with listen(args.port) as found:
        panel = Panel(checkpoint, options)
        panel.load(panel.names if args.compare else [panel.main])
        labels = _labels(checkpoint)
        page = Page(panel, options, args.compare, found.getsockname()[1], labels)
        print(f"{panel.label}: {page.address}", flush=True)
        if labels and len(panel.names) > 1:
            print(f"choices between two replies go to {labels}", file=sys.stderr)
        print("Ctrl-C stops the server", file=sys.stderr)
        return serve(page, found)


def _labels(checkpoint: Any) -> Path | None:
    """The file of choices in the run folder that a checkpoint comes from, if it is in one."""
    run = run_of(checkpoint.folder) if isinstance(checkpoint, Checkpoint) else None
    return run / "labels.jsonl" if run and is_run(run) else None


def _talk(checkpoint: Any, options: ChatOptions, args: argparse.Namespace, piped: bool) -> tuple[int, dict[str, Any]]:
    """In the terminal or from a pipe."""
    from rich.console import Console

    console = Console(highlight=False, stderr=False)
    with console.status(f"loading {label_of(checkpoint)}"):
        from align.serving.conversation import Panel
        from align.serving.terminal import Session, answer_lines, converse

        session = Session(Panel(checkpoint, options), options, args.compare)
        session.panel.load(session.names)
    if options.reward and session.panel.judge is None:
        print("align: no reward model in this chain: replies have no reward", file=sys.stderr)
    if piped:
        return answer_lines(session, args.json)
    return converse(session, console), {}
