"""What an evaluation measures beside its own prompts: options that Hydra shows and checks."""

# No `from __future__ import annotations`: OmegaConf reads these annotations as types.
from dataclasses import dataclass
from typing import Optional

from data_prep.core.options import listing, option


@dataclass
class TaskOptions:
    """Benchmarks that every stage of the chain is measured on."""

    tasks: list[str] = listing(
        "benchmarks: names of lm-evaluation-harness, and YAML files of your own [arc_easy,my_task.yaml]"
    )
    task_limit: Optional[int] = option(None, "documents of each task, the first ones (default: all)", low=1)
    task_shots: Optional[int] = option(None, "examples before each document (default: as each task says)", low=0)
    task_chat: bool = option(False, "whether the prompts of tasks stand in the chat template, examples as turns")
