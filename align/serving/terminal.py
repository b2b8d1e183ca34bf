"""`align chat` in a terminal or a pipe: commands, streaming with word wrap, columns for comparisons.

What models say is printed without its control characters, so that no reply can move the cursor or colour the screen.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from align.serving.conversation import Conversation, Ended, Event, Forgot, Heard, Panel, Said
from align.serving.options import ChatOptions
from data_prep.core.errors import UserError, unknown

INTERRUPTED = 130
COLUMN = 24
"""Narrowest column of a comparison; below it replies stand under each other."""
COMMANDS = {
    "/reset": "forget the conversation",
    "/undo": "take back the last message and its replies",
    "/system TEXT": "set the system prompt (without TEXT: none)",
    "/temperature X": "how freely tokens are drawn; 0 takes the likeliest",
    "/compare": "every policy of the chain answers, or only the last again",
    "/save FILE": "write the conversation as JSON",
    "/help": "this list; a message that starts with a slash is written with two: //",
    "/quit": "leave (so does Ctrl-D)",
}


class Session:
    """A conversation with its settings, and the commands that change them; replies are shown by who asks for them."""

    def __init__(self, panel: Panel, options: ChatOptions, compare: bool) -> None:
        self.panel = panel
        self.options = options
        self.compare = compare
        self.over = False
        self.talk = Conversation(options.system)
        if options.system:
            panel.check_system(options.system)

    @property
    def names(self) -> list[str]:
        """Who answers."""
        return self.panel.names if self.compare else [self.panel.main]

    def answer(self, message: str, stopped: Callable[[], bool]) -> Iterator[Event]:
        """`Panel.answer` with this session's settings."""
        return self.panel.answer(self.talk, message, self.names, self.options, stopped)

    def as_dict(self) -> dict[str, Any]:
        """The conversation as JSON writes it."""
        return {
            "target": self.panel.label,
            "reward_model": self.panel.judge,
            "temperature": self.options.temperature,
            **asdict(self.talk),
        }

    def command(self, line: str) -> str:
        """Obey a line that starts with a slash; returns what to say.

        Raises:
            UserError: an unknown command, or one that cannot be obeyed.
        """
        name, _, rest = line.partition(" ")
        known = {usage.split()[0].removeprefix("/"): usage for usage in COMMANDS}
        if name[1:] not in known:
            raise unknown("command", name, [f"/{each}" for each in known])
        rest = rest.strip()
        if rest and " " not in known[name[1:]]:
            raise UserError(f"{name} takes nothing behind it (got {rest!r})", code="bad_command")
        answer: str = getattr(self, f"_{name[1:]}")(rest)
        return answer

    def _reset(self, rest: str) -> str:
        self.talk = Conversation(self.talk.system)
        return "the conversation starts anew"

    def _undo(self, rest: str) -> str:
        if not self.talk.turns:
            raise UserError("there is nothing to take back", code="bad_command")
        message = self.talk.turns.pop().message
        return f"took back: {message}"

    def _system(self, rest: str) -> str:
        self.panel.check_system(rest or None)
        self.talk.system = rest or None
        return f"system prompt: {rest}" if rest else "no system prompt"

    def _temperature(self, rest: str) -> str:
        if not rest:
            return f"temperature: {self.options.temperature:g}"
        self.options = self.options.changed(temperature=rest)
        return f"temperature: {self.options.temperature:g}"

    def _compare(self, rest: str) -> str:
        self.compare = not self.compare
        self.panel.load(self.names)
        return f"answering: {', '.join(self.names)}"

    def _save(self, rest: str) -> str:
        if not rest:
            raise UserError("/save needs the name of a file", code="bad_command")
        try:
            with open(rest, "x", encoding="utf-8") as stream:
                json.dump(self.as_dict(), stream, indent=1, ensure_ascii=False)
        except FileExistsError:
            raise UserError("there is a file of that name", file=rest, hint="choose another", code="output") from None
        except OSError as problem:
            raise UserError(problem.strerror or "cannot be written", file=rest, code="output") from None
        return f"saved: {rest}"

    def _help(self, rest: str) -> str:
        size, width = max(map(len, COMMANDS)) + 2, shutil.get_terminal_size().columns - 1
        return "\n".join(
            textwrap.fill(f"{usage:<{size}}{text}", width, subsequent_indent=" " * size)
            for usage, text in COMMANDS.items()
        )

    def _quit(self, rest: str) -> str:
        self.over = True
        return ""


# ------------------------------------------------------------------------------------------------------ from a pipe
def answer_lines(session: Session, as_json: bool) -> tuple[int, dict[str, Any]]:
    """Answer every line of standard input; a refused line is said on standard error and makes the exit code 2."""
    code, refused = 0, []
    for row, raw in enumerate(sys.stdin.buffer, 1):
        try:
            line = _decoded(raw, row)
            if line.startswith("/") and not line.startswith("//"):
                _note(session.command(line))
            elif line:
                _print_answer(session, line.removeprefix("/") if line.startswith("//") else line, as_json)
        except UserError as problem:
            code = problem.exit_code
            refused.append({"row": row, **{key: problem.as_dict()[key] for key in ("code", "message", "hint")}})
            _note(f"align: line {row}: {problem}")
        if session.over:
            break
    return code, {**session.as_dict(), "refused": refused}


def _decoded(raw: bytes, row: int) -> str:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise UserError("not UTF-8; it was left out", code="bad_text") from None


def _print_answer(session: Session, message: str, quiet: bool) -> None:
    """One reply as it comes, or of several each under its name."""
    for event in session.answer(message, lambda: False):
        if isinstance(event, Forgot):
            _note(event.notice)
        elif not quiet and isinstance(event, Heard) and not session.compare:
            print(printable(event.text), end="", flush=True)
        elif not quiet and isinstance(event, Ended) and not session.compare:
            print(flush=True)
    if not quiet and session.compare:
        for name, said in session.talk.turns[-1].replies.items():
            print(f"[{' '.join([name, *_signed(said.reward)])}] {printable(said.text)}")
        print(flush=True)


def _note(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- at a terminal
def converse(session: Session, console: Console) -> int:
    """Talk until the reader leaves; returns the exit code: 0, or 130 after Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing for `input`)
    _greet(session, console)
    while not session.over:
        try:
            line = _asked(console)
            if line.startswith("/") and not line.startswith("//"):
                console.print(Text(session.command(line), style="dim"))
            elif line:
                _show_answer(session, line.removeprefix("/") if line.startswith("//") else line, console)
        except UserError as problem:
            console.print(Text(f"align: {problem}", style="red"))
        except EOFError:
            console.print()
            return 0
        except KeyboardInterrupt:
            console.print()
            return INTERRUPTED
    return 0


def _greet(session: Session, console: Console) -> None:
    title = Text.assemble((session.panel.label, "bold"))
    if session.compare:
        title.append(f", compared: {', '.join(session.names)}")
    if session.panel.judge:
        title.append(f" · rewards by {session.panel.judge}", style="dim")
    console.print(title)
    console.print(Text("/help lists the commands · Ctrl-C stops a reply · Ctrl-D leaves", style="dim"))


def _asked(console: Console) -> str:
    """A line from the reader; the prompt goes where the replies go only if that is a terminal."""
    console.print()
    if console.is_terminal:
        return input("> ").strip()
    print("> ", end="", file=sys.stderr, flush=True)
    return input().strip()


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks the reply to stop, the second interrupts at once."""
    asked: list[int] = []

    def interrupt(signum: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _show_answer(session: Session, message: str, console: Console) -> None:
    with _stoppable() as stopped:
        if session.compare:
            _show_comparison(session, session.answer(message, stopped), console)
        else:
            _show_reply(session.answer(message, stopped), console, stopped)


def _show_reply(events: Iterator[Event], console: Console, stopped: Callable[[], bool]) -> None:
    """One reply, word by word as it comes, and a line about it."""
    wrap = Wrap(console.width)
    for event in events:
        if isinstance(event, Heard):
            console.file.write(wrap.more(printable(event.text)))
            console.file.flush()
        elif isinstance(event, Ended):
            console.file.write(wrap.end())
            console.print("\n", Text(about(event.said, stopped()), style="dim"), sep="")
        else:
            console.print(Text(event.notice, style="dim"))


def _show_comparison(session: Session, events: Iterator[Event], console: Console) -> None:
    """All replies at once, growing where the terminal can redraw."""
    texts, said = dict.fromkeys(session.names, ""), dict[str, Said]()
    live = Live(console=console, refresh_per_second=12, auto_refresh=False) if _redraws(console) else None
    with live or contextlib.nullcontext():
        for event in events:
            if isinstance(event, Heard):
                texts[event.model] += printable(event.text)
            elif isinstance(event, Ended):
                said[event.model] = event.said
            else:
                console.print(Text(event.notice, style="dim"))
            if live:
                live.update(side_by_side(texts, said, console.width), refresh=True)
    if not live:
        console.print(side_by_side(texts, said, console.width))


def _redraws(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def side_by_side(texts: dict[str, str], said: dict[str, Said], width: int) -> RenderableType:
    """Replies in columns under their names and rewards, the best reward in bold; stacked where it is too narrow."""
    rewards = [one.reward for one in said.values() if one.reward is not None]
    heads = {}
    for name in texts:
        reward = said[name].reward if name in said else None
        best = len(rewards) == len(texts) and reward == max(rewards)
        heads[name] = Text.assemble((name, "bold"), " ", ("".join(_signed(reward)), "bold green" if best else "dim"))
    if width < COLUMN * len(texts):
        return Group(*[Group(heads[name], Text(texts[name]), Text("")) for name in texts])
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    for name in texts:
        table.add_column(heads[name], ratio=1, overflow="fold")
    table.add_row(*[Text(text) for text in texts.values()])
    return table


def about(said: Said, stopped: bool = False) -> str:
    """Reward and length of a reply, and why it ended if not by itself."""
    parts = [f"reward {_signed(said.reward)[0]}"] if said.reward is not None else []
    parts.append(f"{said.tokens} token{'s' * (said.tokens != 1)}")
    if not said.finished:
        parts.append("stopped" if stopped else "cut at the length limit")
    return " · ".join(parts)


def _signed(reward: float | None) -> list[str]:
    return [] if reward is None else [f"{reward:+.2f}"]


def printable(text: str) -> str:
    """Text without control characters: a reply cannot give orders to the terminal."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


class Wrap:
    """Word wrap for text that arrives in pieces; a word is shown once it has ended."""

    def __init__(self, width: int) -> None:
        self.width = max(1, width - 1)  # the last column makes some terminals break the line themselves
        self._column = 0
        self._space = ""
        self._word = ""

    def more(self, text: str) -> str:
        """What can be written now."""
        parts = []
        for char in text:
            if char == "\n":
                parts += [self.end(), "\n"]
                self._column, self._space = 0, ""
            elif char in " \t":
                parts.append(self.end())
                self._space += " "
            else:
                wide = cell_len(char) > 1
                if wide or cell_len(self._word + char) > self.width:
                    parts.append(self.end())
                self._word += char
                if wide:
                    parts.append(self.end())
        return "".join(parts)

    def end(self) -> str:
        """The word that has been held back."""
        size = cell_len(self._word)
        if not self._word:
            return ""
        breaks = self._column > 0 and self._column + len(self._space) + size > self.width
        front = "\n" if breaks else self._space
        self._column = size if breaks else self._column + len(self._space) + size
        word, self._word, self._space = self._word, "", ""
        return front + word
