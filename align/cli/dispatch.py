"""The command `align`: verbs, their flags, and errors as exit codes. Verbs import what they need when they run.

    0 done | 2 the user can mend it (one line) | 3 training stopped itself | 130 interrupted
With `--json` standard output is exactly one JSON object; everything else goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any, NoReturn

from align.cli.verb import Verb, named
from align.cli.verbs import VERBS
from align.runs.environment import quieten
from data_prep.core.errors import TrainingStopped, UserError, nearest, unknown
from data_prep.core.options import option_types

INTERRUPTED = 130
OUR_FAULT_NOT = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT}
OUR_FAULT_NOT |= {errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO}
"""Operating system errors that a user can mend: full, read-only, forbidden or damaged folders, names and limits."""


ELSEWHERE = {
    "train": "align run trains",
    "generate": "align chat TARGET answers, line by line from a pipe as well",
}
"""What other tools call a verb -> what it is here."""


class _Parser(argparse.ArgumentParser):
    """argparse, with errors as one line."""

    options = ""
    """What the verb takes as KEY=VALUE, module:Class, where that is a dataclass of its own."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage; an unknown flag is answered with the option, or the nearest flag."""
        if message.startswith("unrecognized arguments: "):
            flag = message.partition(": ")[2].split()[0]
            near = nearest(flag, list(self._option_string_actions))
            hint = f"did you mean '{near}'?" if near else "options are KEY=VALUE, without dashes"
            key = flag.lstrip("-").partition("=")[0]
            if self.options and key in option_types(named(self.options)):
                hint = f"options have no dashes: {key}=VALUE"
            raise UserError(f"unknown flag '{flag}'", hint=hint, code="bad_flag")
        raise UserError(message, code="bad_flag")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; `argv` defaults to the command line. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from align.runs.environment import versions

        print(versions().get("align-toolkit", "not installed (running from a source tree)"))
        return 0
    as_json = "--json" in words
    gc.set_threshold(100_000)  # a start makes as many objects that stay; looking for garbage among them takes a quarter
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes imports a compiler: a second of each start
    quieten()
    with json_only() if as_json else contextlib.nullcontext():
        code, answer = _guarded(words)
    if as_json:
        try:
            print(json.dumps(answer, indent=1), flush=True)
        except BrokenPipeError:
            _forget_output()
    return code


def overview() -> str:
    """What `align --help` prints."""
    width = max(len(f"{verb.name} {verb.usage}") for verb in VERBS)
    lines = [f"  align {f'{verb.name} {verb.usage}':<{width}}  {verb.summary}" for verb in VERBS]
    return "\n".join(
        [
            "align: supervised tuning, reward models and PPO with any adapter, chained through checkpoints",
            "",
            *lines,
            "",
            "Overrides are KEY=VALUE: adapter=vera  stages.ppo.lr=1e-5  model=hf model.path=FOLDER  seed=1",
            "TARGET is a path, RUN or RUN/STAGE. Every verb takes --json, --config-dir DIR and --help.",
            "Start with: align run",
        ]
    )


@contextlib.contextmanager
def json_only() -> Iterator[None]:
    """Send everything that is printed, by libraries and child processes too, to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _guarded(words: list[str]) -> tuple[int, dict[str, Any]]:
    """Run a verb; exceptions become an exit code, a line on standard error and the `error` object."""
    try:
        _check_are_text(words)
        with _terminated_as_interrupt():
            return _dispatch(words)
    except (UserError, TrainingStopped) as problem:
        print(problem.in_full("align"), file=sys.stderr)
        return problem.exit_code, {"error": problem.as_dict()}
    except KeyboardInterrupt as interrupt:
        message = _interrupted(words, str(interrupt))
        print(f"align: {message}", file=sys.stderr)
        return INTERRUPTED, {"error": UserError(message, code="interrupted").as_dict()}
    except BrokenPipeError:
        _forget_output()
        return 0, {}
    except OSError as problem:
        if problem.errno not in OUR_FAULT_NOT:
            raise
        error = UserError(problem.strerror or str(problem), file=problem.filename, code="output")
        print(f"align: {error}", file=sys.stderr)
        return error.exit_code, {"error": error.as_dict()}
    except Exception as problem:
        if "--json" not in words:
            raise
        traceback.print_exc()
        return 1, {"error": UserError(f"{type(problem).__name__}: {problem}", code="internal").as_dict()}


def _check_are_text(words: Iterable[str]) -> None:
    """Refuse words of bytes that are no text in this locale: a run could not write them down.

    Raises:
        UserError: there is one.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            hint = "set LC_ALL=C.UTF-8, or give the file or the run a name in UTF-8"
            raise UserError(f"{word!a} is no text in this locale", code="bad_override", hint=hint) from None


def _interrupted(words: list[str], kept: str) -> str:
    """What an interrupted verb says; `kept`: what a run says of its last step, and how to go on."""
    goes_on = kept or "the same command goes on with the first unfinished stage"
    return f"interrupted; {goes_on}" if _verb_of(words) == "run" else "interrupted"


def _forget_output() -> None:
    """The reader of a pipe has left (`align ls | head`): nothing more is to be written, and that is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _verb_of(words: list[str]) -> str:
    """The verb of a command: its first word that is no flag."""
    return next((word for word in words if not word.startswith("-")), words[0])


def _no_verb(word: str, verbs: Iterable[str]) -> UserError:
    """The error for a first word that is no verb: what other tools call one, a pipeline, or a typing error."""
    from align.config.hydra_loader import group_choices, recipes

    hint = ELSEWHERE.get(word)
    with recipes(None):
        if word in group_choices("pipeline"):
            hint = f"it is a pipeline: align run pipeline={word}"
    if hint:
        return UserError(f"there is no verb '{word}'", hint=hint, code="unknown_verb")
    return unknown("verb", word, verbs)


def _dispatch(words: list[str]) -> tuple[int, dict[str, Any]]:
    """Find the verb, read its flags, and call it."""
    verbs = {verb.name: verb for verb in VERBS}
    if words[0] not in verbs:
        first = _verb_of(words)
        if first not in verbs:
            raise _no_verb(first, verbs)
        words = [first, *[word for word in words if word != first]]
    verb, words = _action(verbs[words[0]], words)
    args = _parser(verb).parse_intermixed_args(words[1:])
    if args.help:
        print(importlib.import_module("align.cli.help").help_of(verb))
        return 0, {}
    args.action, args.verbs = verb.name, VERBS
    code, answer = named(verb.function)(args)
    return int(code), dict(answer)


def _action(verb: Verb, words: list[str]) -> tuple[Verb, list[str]]:
    """The action of a verb that has some, with the words from its name on; flags may stand before it."""
    actions = {action.name: action for action in verb.actions}
    first = next((word for word in words[1:] if not word.startswith("-")), None)
    if not actions or (first is None and {"-h", "--help"} & set(words)):
        return verb, words
    if first is None:
        raise UserError(
            f"what? (expected {', '.join(actions)})", code="no_action", hint=f"align {verb.name} {verb.usage}"
        )
    if first not in actions:
        raise unknown(f"action of align {verb.name}", first, actions)
    rest = list(words[1:])
    rest.remove(first)
    action = actions[first]
    return replace(action, name=f"{verb.name} {action.name}", usage=f"{action.usage} [OPTIONS]"), [first, *rest]


def _parser(verb: Verb) -> _Parser:
    """The flags of a verb."""
    parser = _Parser(prog=f"align {verb.name}", add_help=False, allow_abbrev=False)
    parser.options = verb.options
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--config-dir")
    if verb.multirun:
        parser.add_argument("-m", "--multirun", action="store_true")
    for flag in verb.flags:
        name, takes, _ = flag.partition("=")
        parser.add_argument(name, action="store" if takes else "store_true")
    return parser


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """A polite kill (SIGTERM) ends a run as Ctrl-C does."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
