"""`align label`: people compare replies of a run's stages on a page of this computer's own; the choices are kept."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from align.checkpoints.checkpoint import Checkpoint
from align.cli.arguments import extra, read_options, say, split_words
from align.cli.evaluate import recorded_data, recorded_recipe
from align.runs.folder import run_of
from align.serving.options import ChatOptions, LabelOptions, find_policy
from data_prep.core.errors import UserError
from data_prep.core.options import build
from data_prep.options import DataOptions


def label(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Find the policies and the run's prompts, make the pairs and serve the page; or only say what the file holds."""
    targets, words = split_words(args.words, 1)
    if not targets:
        raise UserError("label needs a TARGET: a path, RUN or RUN/STAGE", code="no_target")
    if args.config_dir:
        raise UserError("label takes no recipes", field="--config-dir", code="bad_flag")
    options = read_options(LabelOptions, words)
    if args.port is not None and args.summary:
        raise UserError("a port is for the page", field="--port", hint="leave out --summary", code="bad_flag")
    if args.json and not args.summary:
        raise UserError("the page gives no JSON", field="--json", hint="add --summary", code="bad_flag")
    checkpoint, notes = find_policy(targets[0], options.runs)
    for note in notes:
        print(f"align: {note}", file=sys.stderr)
    if args.summary:
        return _summary(args, options)
    if not isinstance(checkpoint, Checkpoint):
        hint = "tune it first: align run pipeline=sft model=hf model.path=FOLDER"
        raise UserError("a plain model has no run whose prompts it could answer", hint=hint, code="no_prompts")
    return _serve(checkpoint, options, args), {}


def _summary(args: argparse.Namespace, options: LabelOptions) -> tuple[int, dict[str, Any]]:
    from align.serving.labels import label_path, read_labels, summary, told

    path = label_path(options.out)
    if not path.is_file():
        raise UserError("no such file", file=str(path), hint="align label TARGET makes it", code="no_file")
    found = summary(read_labels(path))
    say(args, *told(found))
    return 0, {"file": str(path), **found}


def _serve(checkpoint: Checkpoint, options: LabelOptions, args: argparse.Namespace) -> int:
    """On a page; the port and the file are taken before any weight loads."""
    data, seed = _recorded_prompts(checkpoint)
    with extra("chat"):
        from align.serving.labelling import LabelPage
        from align.serving.local_page import listen, serve
    from align.serving.conversation import Panel
    from align.serving.labels import open_labels, summary, told
    from align.serving.pairs import choose_pairs, compared

    with listen(args.port) as found, open_labels(options.out) as file:
        panel = Panel(checkpoint, ChatOptions(out=options.runs, base=options.base))
        names = " and ".join(dict.fromkeys(compared(panel, options)))
        print(f"align: {names} answer up to {options.prompts} prompts; the page comes behind that", file=sys.stderr)
        choice = choose_pairs(panel, data, seed, options)
        print(f"align: {choice.notice}", file=sys.stderr)
        port, title = found.getsockname()[1], run_of(checkpoint.folder).name
        page = LabelPage(title, choice.pairs, file, options.seed, options.labeller, port)
        print(f"{panel.label}: {page.address}", flush=True)
        print(f"choices go to {file.path}; Ctrl-C stops the server", file=sys.stderr)
        code = serve(page, found)
        print("\n".join(told(summary(file.labels))), file=sys.stderr)
    return code


def _recorded_prompts(checkpoint: Checkpoint) -> tuple[DataOptions, int]:
    """The data that has the prompts of a checkpoint's run, and the run's seed.

    Raises:
        UserError: it is not known which run the checkpoint comes from.
    """
    recipe = recorded_recipe(checkpoint)
    data = recorded_data(recipe, checkpoint.stage) if recipe else None
    if not recipe or not data:
        raise UserError(
            "prompts come from the run's recipe.yaml, and there is none beside this checkpoint",
            file=str(checkpoint.folder),
            hint="label a checkpoint in its run folder",
            code="no_prompts",
        )
    return build(DataOptions, data, "data"), int(recipe["seed"])
