"""How far it is from a loop to the model, and through which files a training row goes: measured on a tiny run.

frames   own functions that stand between the loop of a stage and the model, counted at each forward with gradients
files    own files that give the row a new form (a record, token ids, a batch), seen as they construct it
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from align.models.packing import Packed
from align.training.objectives import PairBatch, SupervisedBatch
from data_prep.sources.rows import Row
from data_prep.types import Conversation, Message, Tokens
from tests.house.source import ROOT

LOOPS = ("align/training/loop.py:fit", "align/rl/ppo.py:passes")
"""Functions that go round: one window, one optimiser step."""
FORMS = (Row, Message, Conversation, Tokens, SupervisedBatch, PairBatch, Packed)
"""What a training row is, from a line of a file to a batch."""


def _own(frame: FrameType) -> str:
    """The file of a frame from the root of the project; empty for a library's, a test's or a comprehension."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT) or frame.f_code.co_name.startswith("<"):
        return ""
    name = path.relative_to(ROOT).as_posix()
    return name if name.startswith(("align/", "data_prep/", "reward/")) else ""


@contextmanager
def frames_to_the_model() -> Iterator[dict[str, list[str]]]:
    """Loop -> the longest chain of own functions seen between it and a forward of the model that is trained."""
    found: dict[str, list[str]] = {}

    def seen(module: Any, _: Any) -> None:
        if not isinstance(module, PreTrainedModel) or not torch.is_grad_enabled():
            return
        chain: list[str] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            here = f"{_own(frame)}:{frame.f_code.co_name}"
            if here in LOOPS:
                if len(chain) > len(found.get(here, [])) or here not in found:
                    found[here] = chain[::-1]
                return
            chain += [here] if _own(frame) else []
            frame = frame.f_back

    hook = register_module_forward_pre_hook(seen)
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def files_of_a_row() -> Iterator[dict[str, str]]:
    """File -> the form that it gave a row first, in order."""
    found: dict[str, str] = {}

    def seen(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == "__init__" and frame.f_back is not None:
            kind = type(frame.f_locals.get("self"))
            if kind in FORMS and (file := _own(frame.f_back)):
                found.setdefault(file, kind.__name__)

    sys.setprofile(seen)
    try:
        yield found
    finally:
        sys.setprofile(None)


def measured() -> tuple[dict[str, list[str]], dict[str, str]]:
    """Both trips, of a tiny chain: the frames of its three training stages, the files of a row of its SFT."""
    from tests.tiny_chain import made

    with files_of_a_row() as files:
        made("sft", "name=trip")
    with frames_to_the_model() as frames:
        made("rlhf", "name=trips")
    return frames, files
