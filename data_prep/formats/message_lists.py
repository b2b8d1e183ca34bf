"""Lists of messages as they stand in rows: roles, contents, tool calls, flags for training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from data_prep.core.errors import UserError, nearest
from data_prep.formats.column_checks import json_of, listed, number_of, object_of, text_of
from data_prep.formats.spelled import like_messages, value_of
from data_prep.sources.rows import Row, kind_of, short
from data_prep.types import Message

OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
TOOLS = ("tools", "functions")
"""Columns of tool schemas; OpenAI called them functions first."""
CALL = "call"  # a turn of ShareGPT whose text is a tool call
SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": CALL,
    "tool_call": CALL,
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    **OPENAI_ROLES,
}
_TOOLS_INTRO = "You may call these tools:"


def content_of(row: Row, field: str, value: Any, *, empty: bool = False) -> str:
    """A message's content: text, or OpenAI's list of text parts."""
    if isinstance(value, list):
        parts = []
        for number, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise row.problem(f"{field}[{number}]", f"unknown part (got {short(str(part))}; expected a text part)")
            parts.append(text_of(row, f"{field}[{number}].text", part.get("text"), empty=True))
        value = "".join(parts)
    return text_of(row, field, value, empty=empty)


def spelled_messages(row: Row, field: str, value: Any) -> Any:
    """A list of messages from what stands in a row: the list, one message, or text that spells either.

    Anything else comes back as it is: a question may well begin with a bracket, an answer be an object.

    Raises:
        UserError: a text begins as messages do and is none (a spreadsheet has cut it off): it is no text to train on.
    """
    found = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{", "a"):
        if value.lstrip()[:1] == "a" and not like_messages(value):
            return value
        try:
            found = value_of(value)
        except ValueError as problem:
            if like_messages(value):
                raise row.problem(
                    field, f"begins as a list of messages and is none: {problem} (got {short(value)!r})"
                ) from problem
            return value
    found = [found] if isinstance(found, dict) else found
    if isinstance(value, list) or (isinstance(found, list) and found and all(_is_message(entry) for entry in found)):
        return found
    return value


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and (entry.keys() >= {"role", "content"} or entry.keys() >= {"from", "value"})


def parse_messages(
    row: Row, field: str, value: Any, roles: Mapping[str, str] | None = None, keys: tuple[str, str] | None = None
) -> tuple[Message, ...]:
    """A list of message objects as Messages; empty system messages are left out.

    Args:
        row: for error messages.
        field: where the list stands.
        value: list of {"role", "content"} (or {"from", "value"}), with `train` (or `loss`), `weight`, `tool_calls`,
            `name` and `tool_call_id` where given; or text that spells such a list in JSON.
        roles: their role name -> ours (or CALL); None: OpenAI's.
        keys: their names for role and content; None: as above.

    Raises:
        UserError: not such a list; an unknown role comes with the nearest known one.
    """
    value = listed(row, field, value)
    if not isinstance(value, list):
        raise row.problem(field, f"wrong type (got {kind_of(value)}; expected a list of messages)")
    if not value:
        raise row.problem(field, "empty (got no messages; expected some)", code="empty")
    messages: list[Message] = []
    for number, entry in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(entry, dict):
            raise row.problem(place, f"wrong type (got {kind_of(entry)}; expected an object with role and content)")
        messages.append(parse_message(row, place, entry, roles, keys))
    return tuple(message for message in messages if message.content or message.role != "system")


def parse_message(
    row: Row,
    place: str,
    entry: dict[str, Any],
    roles: Mapping[str, str] | None = None,
    keys: tuple[str, str] | None = None,
) -> Message:
    """One message object; arguments and errors as those of `parse_messages`."""
    known = OPENAI_ROLES if roles is None else roles
    role_key, text_key = keys or (
        "role" if "role" in entry or "from" not in entry else "from",
        "content" if "content" in entry or "value" not in entry else "value",
    )
    if role_key == "from":
        known = {**SHAREGPT_ROLES, **known}
    role = entry.get(role_key)
    if not isinstance(role, str) or role not in known:
        raise _unknown_role(row, place, entry, role_key, known)
    ours, value, where = known[role], entry.get(text_key), f"{place}.{text_key}"
    if len(entry) == 2 and isinstance(value, str) and ours != CALL:  # most messages are no more than these two
        return Message(ours, text_of(row, where, value, empty=ours in ("system", "tool")))
    train, weight = _train_flag(row, place, entry), _weight(row, place, entry)
    if ours == CALL:
        calls = _calls_in_text(row, where, text_of(row, where, value))
        return Message("assistant", "", train, weight, calls)
    calls = _calls(row, place, entry) if ours == "assistant" else ()
    if ours == "tool" and isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    if value is None and calls:
        value = ""
    content = content_of(row, where, value, empty=ours in ("system", "tool") or bool(calls))
    name = entry.get("name") if ours == "tool" else None
    call_id = entry.get("tool_call_id") if ours == "tool" else None
    return Message(ours, content, train, weight, calls, name, call_id)


def _unknown_role(row: Row, place: str, entry: dict[str, Any], key: str, known: Mapping[str, str]) -> UserError:
    """The error for a message without a role, or with one that nobody knows; with the option that names it."""
    role = entry.get(key)
    got, near = short(repr(role)), nearest(str(role), known)
    guess = "options.roles={theirs: ours} names others"
    if key not in entry:
        got = f"None beside {short(', '.join(map(str, entry)), 60)}"
        guess = "options.role=KEY and options.content=KEY name other keys"
    elif near:
        guess = f"did you mean '{near}'? options.roles={{{role}: {known[near]}}} reads it so"
    message = f"unknown role (got {got}; expected {', '.join(known)}; {guess})"
    return row.problem(f"{place}.{key}", message, code="unknown_role")


def _train_flag(row: Row, place: str, entry: dict[str, Any]) -> bool | None:
    """Whether the loss covers a turn, where `train` says so, or `loss` (ms-swift), which may be 0 or 1."""
    value = entry.get("train")
    if value is None and entry.get("loss") in (0, 1):
        return bool(entry["loss"])
    if value is not None and not isinstance(value, bool):
        raise row.problem(f"{place}.train", f"wrong value (got {short(repr(value))}; expected true or false)")
    return value


def _weight(row: Row, place: str, entry: dict[str, Any]) -> float | None:
    value = entry.get("weight")
    if value is None:
        return None
    weight = number_of(row, f"{place}.weight", value)
    if weight < 0:
        raise row.problem(f"{place}.weight", f"wrong value (got {weight:g}; expected a number of at least 0)")
    return weight


# ------------------------------------------------------------------------------------------------------------- tools
def _calls(row: Row, place: str, entry: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """OpenAI's `tool_calls` (or its older `function_call`) as {"name", "arguments"} with the `id` where given."""
    given, field = entry.get("tool_calls"), f"{place}.tool_calls"
    if given is None and entry.get("function_call") is not None:
        given, field = [entry["function_call"]], f"{place}.function_call"
    if isinstance(given, str):
        given = json_of(row, field, given)
    if not given:
        return ()
    if not isinstance(given, list):
        raise row.problem(field, f"wrong type (got {kind_of(given)}; expected a list of calls)")
    calls = []
    for number, call in enumerate(given):
        where = f"{field}[{number}]"
        outer = object_of(row, where, call)
        calls.append(_call(row, where, outer.get("function") or outer, outer.get("id")))
    return tuple(calls)


def _call(row: Row, field: str, value: Any, call_id: Any = None) -> dict[str, Any]:
    call = object_of(row, field, value)
    name = text_of(row, f"{field}.name", call.get("name"))
    given = call.get("arguments", call.get("parameters"))
    arguments = {} if given in (None, "") else object_of(row, f"{field}.arguments", given)
    return {"name": name, "arguments": arguments, **({"id": str(call_id)} if call_id else {})}


def _calls_in_text(row: Row, field: str, text: str) -> tuple[dict[str, Any], ...]:
    """Calls spelled as JSON text: one object, or a list of them."""
    value = json_of(row, field, text)
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise row.problem(field, "empty (got no call; expected one or more)", code="empty")
    return tuple(_call(row, field, item) for item in listed)


def parse_tools(row: Row, field: str | None = None) -> tuple[dict[str, Any], ...]:
    """The row's tool schemas, from lists or from texts that spell one in JSON, in OpenAI's form.

    Args:
        row: the row.
        field: the column; None: those of `TOOLS`.

    Raises:
        UserError: not such a list, or a tool without a name.
    """
    if field is None:
        return tuple(_distinct(tool for name in TOOLS for tool in parse_tools(row, name)))
    value = row.data.get(field)
    if isinstance(value, str):
        value = json_of(row, field, value) if value.strip() else None
    if not value:
        return ()
    if not isinstance(value, list):
        raise row.problem(field, f"wrong type (got {kind_of(value)}; expected a list of tools)")
    tools = []
    for number, entry in enumerate(value):
        where = f"{field}[{number}]"
        outer = object_of(row, where, entry)
        tool = object_of(row, f"{where}.function", outer["function"]) if outer.get("function") else outer
        text_of(row, f"{where}.name", tool.get("name"))
        tools.append({"type": "function", "function": tool})
    return tuple(tools)


def _distinct(tools: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools, each once."""
    found: list[dict[str, Any]] = []
    for tool in tools:
        if tool not in found:
            found.append(tool)
    return found


def without_nulls(value: Any) -> tuple[Any, int]:
    """(a value without the null members of its objects, how many these were); nulls in lists stay."""
    if isinstance(value, list):
        parts = [without_nulls(one) for one in value]
        return [part for part, _ in parts], sum(count for _, count in parts)
    if not isinstance(value, dict):
        return value, 0
    inner = {key: without_nulls(one) for key, one in value.items() if one is not None}
    lost = len(value) - len(inner) + sum(count for _, count in inner.values())
    return {key: part for key, (part, _) in inner.items()}, lost


def tools_as_text(messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]) -> tuple[Message, ...]:
    """The same dialogue for templates without tools: schemas in the system message, calls as JSON, results as the user.

    Results that follow one another become one message.
    """
    if tools:
        schemas = "\n".join([_TOOLS_INTRO, *(_json(tool["function"]) for tool in tools)])
        has_system = bool(messages) and messages[0].role == "system"
        said = f"{messages[0].content}\n\n{schemas}" if has_system else schemas
        messages = (Message("system", said), *messages[has_system:])
    result: list[Message] = []
    after_tool = False
    for message in messages:
        if message.role == "tool":
            if after_tool:
                result[-1] = replace(result[-1], content=f"{result[-1].content}\n{message.content}")
            else:
                result.append(Message("user", message.content))
        elif message.calls:
            calls = [_json({"name": call["name"], "arguments": call["arguments"]}) for call in message.calls]
            said = "\n".join([message.content, *calls] if message.content else calls)
            result.append(replace(message, content=said, calls=()))
        else:
            result.append(message)
        after_tool = message.role == "tool"
    return tuple(result)


# ------------------------------------------------------------------------------------------------- records to rows
def message_entry(message: Message) -> dict[str, Any]:
    """A message as an object of an OpenAI message list."""
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        entry["tool_calls"] = [
            {"type": "function", **({"id": call["id"]} if "id" in call else {}), "function": _called(call)}
            for call in message.calls
        ]
    more = {"train": message.train, "weight": message.weight, "name": message.name, "tool_call_id": message.call_id}
    return entry | {key: value for key, value in more.items() if value is not None}


def _called(call: dict[str, Any]) -> dict[str, Any]:
    return {"name": call["name"], "arguments": call["arguments"]}


def spoken(messages: tuple[Message, ...], *roles: str) -> list[str] | None:
    """The contents of messages that have exactly these roles and nothing but words; None for others."""
    plain = tuple(Message(role, message.content) for role, message in zip(roles, messages, strict=False))
    return [message.content for message in messages] if plain == messages else None


def asked_columns(messages: tuple[Message, ...], column: str = "prompt") -> dict[str, Any]:
    """The columns of a prompt: text for one question, with `system` where there is one, else a list of messages."""
    if question := spoken(messages, "user"):
        return {column: question[0]}
    if question := spoken(messages, "system", "user"):
        return {column: question[1], "system": question[0]}
    return {column: [message_entry(message) for message in messages]}


def more_columns(record: Any) -> dict[str, Any]:
    """The columns `tools`, `split` and `features` of a record, where it has them."""
    told = {name: record.meta[name] for name in ("split", "features") if record.meta.get(name)}
    return ({"tools": list(record.tools)} if record.tools else {}) | told


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
