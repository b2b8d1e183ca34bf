"""oasst: trees of messages (OpenAssistant, arXiv 2304.07327), whole in a row or one message per row.

{"message_tree_id", "prompt": {"text", "role": "prompter", "replies": [...], "rank"}} or rows {"message_id",
"parent_id", "text", "role", "rank"}. Dialogues follow the best-ranked replies, or all paths; every two ranked replies
to one message make a preference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from data_prep.core.errors import UserError, nearest
from data_prep.formats.base import FORMATS, Format, Found, pair
from data_prep.formats.column_checks import meta_of, number_of, object_of, text_of
from data_prep.formats.ranked import pairs_of
from data_prep.sources.rows import Row, Skip, kind_of, short
from data_prep.types import CONVERSATION, PREFERENCE, PROMPT, Conversation, Message, Preference, Prompt

_ROLES = {"prompter": "user", "assistant": "assistant", "system": "system"}
Path = tuple["Node", ...]


@dataclass
class Node:
    """One message of a tree: `rank` 0 is the best of its siblings, None unknown."""

    row: Row
    role: str
    text: str
    rank: float | None
    replies: list[Node] = field(default_factory=list)

    def message(self, train: bool | None = None) -> Message:
        """The node as a turn."""
        return Message(self.role, self.text, train)


@FORMATS.register("oasst")
class Oasst(Format):
    """Trees of messages."""

    kinds = (CONVERSATION, PREFERENCE, PROMPT)
    spellings = (("message_tree_id", "prompt"), ("message_id", "parent_id", "text", "role"))
    extras = ("rank", "deleted", "lang", "message_tree_id", "tree_state")
    option_help: ClassVar[Mapping[str, str]] = {
        "paths": "best (one dialogue per tree, along the best-ranked replies; default) or all",
        "pairs": "pairs of ranked replies: all (default), neighbours in rank, or best_worst",
        "lang": "keep trees of this language alone, such as en (others are skipped and counted)",
    }

    def __init__(self, options: dict[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.paths = self.choice("paths", "best", "all")
        self.pairs = self.choice("pairs", "all", "neighbours", "best_worst")

    # ----------------------------------------------------------------- records
    def conversations(self, rows: Iterable[Row]) -> Found[Conversation]:
        """The dialogues of every tree."""
        for tree in self._trees(rows):
            if not isinstance(tree, Node):
                yield tree
                continue
            paths = self._paths(tree)
            trained: set[int] = set()
            for number, path in enumerate(paths, start=1):
                messages = tuple(node.message(False if id(node) in trained else None) for node in path)
                trained.update(id(node) for node in path)
                suffix = f"#path{number}" if len(paths) > 1 else ""
                yield Conversation(messages, tree.row.id + suffix, meta_of(tree.row))
            if not paths:
                yield Skip("no_reply_in_tree")

    def preferences(self, rows: Iterable[Row]) -> Found[Preference]:
        """The ranked replies of every tree, two by two."""
        for tree in self._trees(rows):
            if isinstance(tree, Node):
                yield from self._pairs(tree)
            else:
                yield tree

    def prompts(self, rows: Iterable[Row]) -> Found[Prompt]:
        """The first message of every tree."""
        for tree in self._trees(rows):
            yield Prompt((tree.message(),), tree.row.id, meta_of(tree.row)) if isinstance(tree, Node) else tree

    def _paths(self, tree: Node) -> list[Path]:
        """Paths from the root that end in an assistant's turn, best first; a path inside another is left out."""
        found: list[Path] = []
        waiting: list[Path] = [(tree,)]
        while waiting:
            path = waiting.pop()
            replies = sorted(path[-1].replies, key=_order)
            if self.paths == "best":
                replies = replies[:1]
            if replies:
                waiting.extend((*path, reply) for reply in reversed(replies))
            else:
                path = path if path[-1].role == "assistant" else path[:-1]
                if len(path) > 1 and not any(_inside(path, other) for other in found):
                    found.append(path)
        return found

    def _pairs(self, tree: Node) -> Iterator[Preference | UserError | Skip]:
        made = 0
        waiting: list[Path] = [(tree,)]
        while waiting:
            path = waiting.pop()
            waiting.extend((*path, reply) for reply in reversed(path[-1].replies))
            ranked = [(n.rank, n.text, None) for n in path[-1].replies if n.role == "assistant" and n.rank is not None]
            if len(ranked) < 2:
                continue
            prompt = tuple(node.message() for node in path)
            for better, worse, _ in pairs_of(ranked, self.pairs):
                if better.strip() == worse.strip():
                    yield Skip("equal_replies")
                    continue
                made += 1
                yield pair(tree.row, prompt, better, worse, f"#pair{made}", meta=meta_of(tree.row))
        if not made:
            yield Skip("no_ranked_replies")

    # ------------------------------------------------------------------- trees
    def _trees(self, rows: Iterable[Row]) -> Iterator[Node | UserError | Skip]:
        """Trees with two or more turns, problems, and reasons why a tree is left out."""
        flat: list[Row] = []
        for row in rows:
            if "parent_id" in row.data or not row.data.get("prompt"):
                flat.append(row)
                continue
            try:
                yield self._kept(row.data["prompt"], _nested(row))
            except UserError as problem:
                yield problem
        yield from self._joined(flat)

    def _kept(self, entry: Any, tree: Node) -> Node | Skip:
        lang = self.options.get("lang")
        said = entry.get("lang") if isinstance(entry, dict) else None
        return Skip("other_language") if lang and said != lang else tree

    def _joined(self, rows: list[Row]) -> Iterator[Node | UserError | Skip]:
        """Trees from rows of one message each."""
        nodes: dict[str, Node] = {}
        bad: set[str] = set()
        for row in rows:
            identity = str(row.data.get("message_id"))
            try:
                text_of(row, "message_id", row.data.get("message_id"))
                if identity in nodes:
                    raise row.problem("message_id", f"stands twice (got {short(identity)}; expected one row for each)")
                if row.data.get("deleted") is True:
                    bad.add(identity)
                    yield Skip("deleted_message")
                else:
                    nodes[identity] = _node(row, "", row.data)
            except UserError as problem:
                bad.add(identity)
                yield problem
        roots: list[Node] = []
        lost: list[Node] = []
        for node in nodes.values():
            parent = node.row.data.get("parent_id")
            above = nodes.get(str(parent))
            if parent is None or parent == "":
                roots.append(node)
            elif above is None and str(parent) in bad:
                lost.append(node)
            elif above is None:
                lost.append(node)
                yield node.row.problem(
                    "parent_id", f"names no message of these rows (got {short(str(parent))}; expected a message_id)"
                )
            elif above.role == node.role:
                lost.append(node)
                yield node.row.problem(
                    "role", f"answers its like (got {node.role} below {node.role}; expected the other role)"
                )
            else:
                above.replies.append(node)
        yield from self._from_roots(roots, lost, nodes)

    def _from_roots(
        self, roots: list[Node], lost: list[Node], nodes: dict[str, Node]
    ) -> Iterator[Node | UserError | Skip]:
        below = {id(node) for node in _below(lost)} - {id(node) for node in lost}
        yield from [Skip("below_a_lost_message")] * len(below)
        reached = {id(node) for node in _below([*roots, *lost])}
        for node in nodes.values():
            if id(node) not in reached:
                yield node.row.problem("parent_id", "leads back to the message itself (got a ring; expected a tree)")
        for root in roots:
            if root.role == "assistant":
                yield root.row.problem("role", "begins a tree (got assistant; expected prompter)")
            else:
                yield self._kept(root.row.data, root)


def _below(nodes: list[Node]) -> Iterator[Node]:
    """These nodes and all that stand below them."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.replies)


def _order(node: Node) -> float:
    return float("inf") if node.rank is None else node.rank


def _inside(path: Path, other: Path) -> bool:
    return len(path) <= len(other) and all(a is b for a, b in zip(path, other, strict=False))


def _node(row: Row, place: str, entry: dict[str, Any]) -> Node:
    dot = f"{place}." if place else ""
    role = entry.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        near = nearest(str(role), _ROLES)
        guess = f"; did you mean '{near}'?" if near else ""
        raise row.problem(
            f"{dot}role", f"unknown role (got {short(repr(role))}; expected {', '.join(_ROLES)}{guess})", "unknown_role"
        )
    rank = entry.get("rank")
    number = None if rank is None or rank == "" or rank != rank else number_of(row, f"{dot}rank", rank)
    return Node(row, _ROLES[role], text_of(row, f"{dot}text", entry.get("text")), number)


def _nested(row: Row) -> Node:
    """The tree of a row that holds all of it; deleted messages are left out with what stands below them."""
    tree = object_of(row, "prompt", row.data["prompt"])
    root = _node(row, "prompt", tree)
    if root.role == "assistant":
        raise row.problem("prompt.role", "begins a tree (got assistant; expected prompter)")
    waiting = [("prompt", tree, root)]
    while waiting:
        place, entry, node = waiting.pop()
        replies = entry.get("replies") or []
        if not isinstance(replies, list):
            raise row.problem(f"{place}.replies", f"wrong type (got {kind_of(replies)}; expected a list of messages)")
        for number, value in enumerate(replies):
            where = f"{place}.replies[{number}]"
            inner = object_of(row, where, value)
            if inner.get("deleted"):
                continue
            child = _node(row, where, inner)
            if child.role == node.role:
                raise row.problem(
                    f"{where}.role", f"answers its like (got {child.role} below {node.role}; expected the other role)"
                )
            node.replies.append(child)
            waiting.append((where, inner, child))
    return root
