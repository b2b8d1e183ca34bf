"""sharegpt: {"conversations": [{"from": "human" | "gpt" | "system", "value"}, ...]}; `system` and `tools` are optional.

`function_call` turns hold a call as JSON, `observation` turns a tool's result; `tools` is a list or JSON text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from data_prep.formats.base import FORMATS
from data_prep.formats.chat import CALL
from data_prep.formats.messages import Messages

SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "function_call": CALL,
    "tool_call": CALL,
    "observation": "tool",
    "tool": "tool",
}


@FORMATS.register("sharegpt")
class ShareGpt(Messages):
    """A list of from and value objects."""

    spellings = (("conversations",), ("conversation",))
    columns: ClassVar[tuple[str, ...]] = ("conversations", "conversation")
    roles = SHAREGPT_ROLES
