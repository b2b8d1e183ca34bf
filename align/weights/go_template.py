"""A chat template in Go's template language, which is what Ollama runs: learnt from what our own rendering writes.

A chat template is a program in Jinja, and no other language says all of it. What most of them do is said by a few
texts: what stands before and after what each speaker says, what opens a talk, what asks for a reply. They are read off
talks rendered around marks. Further talks, made of these texts, must then equal our own rendering to the character;
a template that writes anything else is refused. How it changes contents themselves (it may trim them) no text says,
and Go has no word for it: that is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from data_prep.core.errors import UserError
from data_prep.types import Message

Render = Callable[[Sequence[Message]], str]
"""Messages as text."""
Around = tuple[str, str]
"""What stands before and after what a speaker says."""
_MARK = "q{}Zx"
"""Contents that no template holds."""
_CONTENTS = (
    "Hello!",
    'say "hi" {{ .Content }} {% x %}',
    "two\nlines \\n",
    "ünïcödé \U0001f642 漢字",
    "5 < 6, #1",
    "a-b",
)


@dataclass(frozen=True)
class Turns:
    """A chat template that writes turn after turn in the same way."""

    bos: str
    """What stands before everything."""
    opening: str
    """What stands before the first turn where that is no system message."""
    system: Around | None
    """None where the template takes no system message."""
    user: Around
    assistant: Around
    reply: str
    """What asks for a reply."""

    @property
    def edge(self) -> str:
        """What a reply begins with that is no part of its text: Ollama keeps it as one."""
        before = self.assistant[0]
        return before[len(self.reply) :] if self.reply and before.startswith(self.reply) else ""

    def said(self, messages: Sequence[Message]) -> str:
        """The text of messages that ask for a reply, as the Go template writes it."""
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        turns = ["".join((around[one.role][0], one.content, around[one.role][1])) for one in messages]
        opening = self.opening if messages[0].role != "system" else ""
        return "".join((self.bos, opening, *turns, self.reply))

    def go(self) -> str:
        """The template for Ollama, which gives it `.Messages` with a role and a content each."""
        loop = "{{ range .Messages }}"
        if self.opening:
            unless = '(and (eq $i 0) (ne .Role "system"))' if self.system else "eq $i 0"
            loop = f"{{{{ range $i, $_ := .Messages }}}}{{{{ if {unless} }}}}{_text(self.opening)}{{{{ end }}}}"
        before, edge = self.assistant[0].removesuffix(self.edge), ""
        if self.edge:
            begins = f'printf "%.{len(self.edge)}s" .Content'
            edge = f"{{{{ if ne ({begins}) {_literal(self.edge)} }}}}{_text(self.edge)}{{{{ end }}}}"
        speakers = {"user": self.user, "assistant": (_text(before) + edge, self.assistant[1])}
        parts, word = [_text(self.bos), loop], "if"
        for role, (front, back) in {"system": self.system, **speakers}.items() if self.system else speakers.items():
            front = front if role == "assistant" else _text(front)
            parts.append(f'{{{{ {word} eq .Role "{role}" }}}}{front}{{{{ .Content }}}}{_text(back)}')
            word = "else if"
        return "".join((*parts, "{{ end }}{{ end }}", _text(self.reply)))


def learn(prompt: Render, whole: Render, bos: str) -> Turns:
    """The texts of a chat template, proven on other talks.

    Args:
        prompt: messages and what asks for a reply, as a policy was trained to read them.
        whole: messages alone; where it refuses some (`UserError`), a cut may fall at another place of the same text.
        bos: the text of the token that may stand before everything.

    Raises:
        UserError: the template does not write turn after turn in the same way.
    """
    start, to_assistant, to_user, *again, ends = _between(prompt, "user", "assistant", "user", "assistant", "user")
    if again != [to_assistant, to_user]:
        raise _refused(f"it writes {again!r} where it wrote {[to_assistant, to_user]!r} before")
    first = ["", ""]
    try:
        first = _between(prompt, "system", "user")[:2]
        system = True
    except UserError:
        system = False
    if not bos or not start.startswith(bos) or (system and not first[0].startswith(bos)):
        bos = ""
    start, before_system = start.removeprefix(bos), first[0].removeprefix(bos)
    after_user = _common([to_assistant, ends, *_last(whole, "user")])
    after_assistant = _common([to_user, *_last(whole, "user", "assistant")])
    before_user = _common_end([to_user[len(after_assistant) :], start, *([first[1]] if system else [])])
    turns = Turns(
        bos=bos,
        opening=start.removesuffix(before_user),
        system=(before_system, first[1].removesuffix(before_user)) if system else None,
        user=(before_user, after_user),
        assistant=(to_assistant[len(after_user) :], to_user.removesuffix(before_user)),
        reply=ends[len(after_user) :],
    )
    _prove(turns, prompt)
    return turns


def changes(turns: Turns, prompt: Render) -> list[str]:
    """What a proven template does to contents, in words: Ollama gives them to the model as they are."""
    kinds = {
        "blanks at the ends of a {}": " \n x \n ",
        "the thought in a {} that is over": "<think>\ny\n</think>\n\nx",
    }
    found = []
    for kind, content in kinds.items():
        for role, name in (("system", "system message"), ("user", "message"), ("assistant", "reply")):
            talk = _talk(*(["system"] if turns.system else []), "user", "assistant", "user")
            talk = [Message(one.role, content) if one.role == role else one for one in talk]
            try:
                same = prompt(talk) == turns.said(talk)
            except UserError:
                same = False
            if not same:
                found.append(f"the chat template changes {kind.format(name)}; Ollama leaves it as it is")
    if turns.system is None:
        found.append("the chat template takes no system message: Ollama leaves one out")
    return found


def _talk(*roles: str) -> list[Message]:
    return [Message(role, _MARK.format(place)) for place, role in enumerate(roles)]


def _between(render: Render, *roles: str) -> list[str]:
    """The texts before, between and after the contents of a talk.

    Raises:
        UserError: a content does not stand there once and in its place.
    """
    talk = _talk(*roles)
    parts, rest = [], render(talk)
    for message in talk:
        if rest.count(message.content) != 1:
            raise _refused(f"it writes the content of a turn ({message.role}) {rest.count(message.content)} times")
        part, rest = rest.split(message.content)
        parts.append(part)
    return [*parts, rest]


def _last(whole: Render, *roles: str) -> list[str]:
    """What stands after the last content of a talk that asks for nothing; nothing where the template takes none."""
    try:
        return [_between(whole, *roles)[-1]]
    except UserError:
        return []


def _common(texts: list[str]) -> str:
    """What all texts begin with."""
    size = sum(1 for _ in takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False)))
    return texts[0][:size]


def _common_end(texts: list[str]) -> str:
    return _common([text[::-1] for text in texts])[::-1]


def _prove(turns: Turns, prompt: Render) -> None:
    """Compare further talks to the character.

    Raises:
        UserError: one is another text.
    """
    fronts = [[], ["system"]] if turns.system else [[]]
    for front in fronts:
        for rounds in range(4):
            roles = [*front, *["user", "assistant"] * rounds, "user"]
            for shift in range(len(_CONTENTS)):
                talk = [Message(role, _CONTENTS[(at + shift) % len(_CONTENTS)]) for at, role in enumerate(roles)]
                wanted, found = prompt(talk), turns.said(talk)
                if wanted != found:
                    at = len(_common([wanted, found]))
                    raise _refused(
                        f"in a talk of {len(talk)} messages it writes {wanted[at : at + 30]!r} "
                        f"where turn after turn has {found[at : at + 30]!r}"
                    )


def _refused(why: str) -> UserError:
    return UserError(
        f"the chat template cannot be said in Go's template language: {why}",
        code="not_for_ollama",
        hint="to=gguf writes a file for llama.cpp, which runs the template as it is",
    )


def _text(text: str) -> str:
    """A text in a template: as it is, or quoted where Go or the Modelfile would read it otherwise."""
    plain = all(char.isprintable() or char == "\n" for char in text) and not set(text) & set('{"')
    return text if plain else f"{{{{ {_literal(text)} }}}}"


def _literal(text: str) -> str:
    """A text as a string of Go."""
    known = {'"': '\\"', "\\": "\\\\", "\n": "\\n"}
    return (
        '"' + "".join(known.get(char) or (char if char.isprintable() else f"\\U{ord(char):08x}") for char in text) + '"'
    )
