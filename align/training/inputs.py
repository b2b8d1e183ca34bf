"""What decides a stage's result, and which of it another attempt at the same result may change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_prep.core.hashing import sha256_json

PASSES = ("micro_batch_size", "micro_tokens", "gradient_checkpointing")
"""Options that say how a step is computed, not what it computes. They change a result by rounding alone, as does the
number of processes, but for what each of them draws: dropout, and the replies of PPO."""


@dataclass(frozen=True)
class Inputs:
    """Everything that decides a stage's result, as JSON holds it; `options` are those of the stage."""

    values: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """Of all of it: equal inputs give equal results."""
        return sha256_json(self.values)

    @cached_property
    def work_digest(self) -> str:
        """Of all but how steps are computed, and by how many: what a kept state must agree on for its work to go on."""
        options = {name: value for name, value in self.values.get("options", {}).items() if name not in PASSES}
        return sha256_json({**self.values, "options": options, "processes": None})

    def with_options(self, **options: Any) -> Inputs:
        """These with other options of the stage."""
        return Inputs({**self.values, "options": {**self.values["options"], **options}})

    def changed_from(self, earlier: Inputs) -> list[str]:
        """What is not as it was: `lr=0.002 (0.001 before)` for options, names for the rest, such as `data`."""
        told = []
        for name in sorted({*self.values, *earlier.values}):
            now, then = self.values.get(name), earlier.values.get(name)
            if now == then:
                continue
            if isinstance(now, Mapping) and isinstance(then, Mapping) and name in ("options", "adapter"):
                told += [
                    f"{'adapter.' * (name == 'adapter')}{key}={_said(now.get(key))} ({_said(then.get(key))} before)"
                    for key in sorted({*now, *then})
                    if now.get(key) != then.get(key)
                ]
            elif name in ("processes", "seed"):
                told.append(f"{name}={now} ({then} before)")
            else:
                told.append(name.replace("_", " "))
        return told


def _said(value: Any) -> str:
    """A value as one writes it in an override."""
    return value if isinstance(value, str) else json.dumps(value)
