"""sharegpt: {"conversations": [{"from": "human" | "gpt" | "system", "value"}, ...]}; `system` and `tools` are optional.

`function_call` turns hold a call as JSON, `observation` turns a tool's result; `tools` is a list or JSON text.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from data_prep.formats.base import FORMATS
from data_prep.formats.message_lists import SHAREGPT_ROLES, message_entry
from data_prep.formats.messages import Messages
from data_prep.types import Message


@FORMATS.register("sharegpt")
class ShareGpt(Messages):
    """A list of from and value objects."""

    spellings = (("conversations",), ("conversation",))
    columns: ClassVar[tuple[str, ...]] = ("conversations", "conversation")
    roles = SHAREGPT_ROLES

    def entry(self, message: Message) -> dict[str, Any]:
        """One message as an object with `from` and `value`."""
        names = {"user": "human", "assistant": "gpt", "tool": "observation"}
        entry = message_entry(message)
        said: dict[str, Any] = {"from": names.get(message.role, message.role), "value": entry.pop("content")}
        if calls := entry.pop("tool_calls", None):
            called = [call["function"] for call in calls]
            said = {"from": "function_call", "value": json.dumps(called[0] if len(called) == 1 else called)}
        return said | {key: value for key, value in entry.items() if key != "role"}
