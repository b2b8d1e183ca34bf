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


@dataclass
class JudgeOptions:
    """A model behind an endpoint that compares the last policy's replies with those of the policies before it."""

    judge: Optional[str] = option(None, "who compares replies: openai:URL of an OpenAI-compatible endpoint")
    judge_model: Optional[str] = option(None, "the judge's name at the endpoint")
    judge_tokens: int = option(512, "longest answer of the judge in tokens", low=1)
    judge_timeout: float = option(60.0, "seconds to wait for an answer of the judge", above=0)
    judge_retries: int = option(3, "times that a request without an answer is sent to the judge again")
    judge_wait: float = option(1.0, "seconds before it is sent again; doubled each time")
    judge_parallel: int = option(4, "requests at a time", low=1, high=256)


@dataclass
class PairsOptions:
    """Pairs that the reward model orders."""

    pairs: Optional[str] = option(
        None, "file of pairs (prompt, chosen, rejected, section or subset) for the reward model, as RewardBench's"
    )
