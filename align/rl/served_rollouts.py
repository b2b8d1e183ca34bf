"""Replies sampled by vLLM, or by any server that has its routes, in place of the engine that a stage has itself.

    GET   /v1/models              whether it is there
    POST  /v1/load_lora_adapter   {"lora_name", "lora_path", "load_inplace": true}: the policy, before every update
    POST  /v1/completions         {"model", "prompt": [id, ...], "seed", "logprobs": 0, "return_token_ids": true, ...}
    200   {"choices": [{"token_ids": [...], "logprobs": {"token_logprobs": [...]}}]}

The policy goes as a folder of megabytes that the server reads, so both see it under one path; weights of the base are
never sent. One request for each reply, with a seed of its own; a server that keeps prefixes reads a prompt once.
TRL and OpenRLHF send all weights over NCCL in its place. `align/rl/advantages.py:weigh` has what is made of the
difference between what a server samples from and what is trained. No torch.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import TrainingStopped, UserError
from data_prep.core.http import FoundT, NoAnswerError, ask, ask_json, is_server, patiently

if TYPE_CHECKING:
    from align.adapters.base import Adapter
    from align.inference.generation import Reply, Sampling
    from align.rl.options import PPOOptions
    from align.roles import Role

AT_ONCE = 64
"""Requests that a server has at a time, from one process."""
RETRIES, WAIT = 4, 1.0
"""How often a request without an answer is sent again, and the seconds before that, doubled each time."""
_UNKNOWN = 404
_TENSORS = ".safetensors"
FLAGS = "--enable-lora --logprobs-mode processed_logprobs"
_HINT = "start it, then the same command; docs/scale.md says how"


def method_refusal(adapter: Adapter, where: str) -> Iterator[UserError]:
    """A method whose checkpoints are no LoRA on the base that the servers have."""
    name = getattr(adapter, "method", type(adapter).__name__)
    is_lora = getattr(adapter, "peft_type", None) == "LORA" and adapter.traits.low_rank and adapter.traits.portable
    if is_lora and adapter.quantization() is None:
        return
    why = "a base in 4 bits, which vLLM reads otherwise" if is_lora else "more or less than a plain LoRA"
    yield UserError(
        f"vLLM cannot sample from {name} as set: it is {why}",
        field=f"{where}.rollout",
        code="illegal_method",
        hint=f"take adapter=lora for this stage, or leave {where}.rollout out",
    )


def server_refusals(urls: Sequence[str], where: str, timeout: float) -> Iterator[UserError]:
    """Servers that are none, or that do not answer."""
    for url in urls:
        said = "" if is_server(url) else "is no address of a server"
        try:
            if not said and "data" not in ask_json(f"{url.rstrip('/')}/v1/models", None, timeout):
                said = "lists no models under /v1/models"
        except (NoAnswerError, TypeError) as problem:
            said = str(problem)
        if said:
            yield UserError(f"the server {url} {said}", field=f"{where}.rollout_url", code="no_server", hint=_HINT)


class ServedEngine:
    """Asks servers for the replies of one process.

    Args:
        name: what the policy is called there; no other run has it.
        folder: where the policy is written, which the servers see too.
        end_id: the token that ends a reply.
        share: (index, number) of the processes, which divide the servers.
    """

    def __init__(self, options: PPOOptions, name: str, folder: Path, end_id: int, share: tuple[int, int]) -> None:
        self._all = [url.rstrip("/") for url in options.rollout_url]
        index, count = share
        self._own = self._all[index::count] or [self._all[index % len(self._all)]]
        self._timeout = options.rollout_timeout
        self._name, self._folder, self._end_id = name, folder.resolve(), end_id
        self._beside, self._closed = ThreadPoolExecutor(1), False

    def renew(self, role: Role) -> None:
        """Write the policy down and let all servers read it; one process does so for all.

        Raises:
            TrainingStopped: a server that does not.
        """
        assert role.adapter is not None
        self._folder.mkdir(exist_ok=True)
        role.adapter.save(role.carrier, self._folder)
        self._let_read()

    def handed(self) -> dict[str, Any]:
        """The files that servers have read: tensors, and texts."""
        from safetensors.torch import load

        return {
            file.name: load(file.read_bytes()) if file.suffix == _TENSORS else file.read_text(encoding="utf-8")
            for file in sorted(self._folder.iterdir())
        }

    def hand_over(self, handed: dict[str, Any]) -> None:
        """Write such files down again, and let all servers read them.

        Raises:
            TrainingStopped: a server that does not.
        """
        from safetensors.torch import save

        self._folder.mkdir(exist_ok=True)
        for name, held in handed.items():
            content = held.encode() if isinstance(held, str) else save(held, {"format": "pt"})
            (self._folder / name).write_bytes(content)
        self._let_read()

    def _let_read(self) -> None:
        for url in self._all:
            _asked(url, partial(self._load, url))

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], update: int
    ) -> list[Reply]:
        """One reply per prompt, in order, each drawn with its seed; the servers divide them.

        Args:
            update: whose policy it is; what servers keep of prompts that they have read is of one policy.

        Raises:
            TrainingStopped: a server that gives none, or something else.
        """

        def reply(place: int) -> Reply:
            if self._closed:
                raise TrainingStopped("no more replies are wanted", code="rollout_failed")
            url = self._own[place % len(self._own)]
            asked = self._request(prompts[place], sampling) | {"seed": seeds[place]}
            asked["cache_salt"] = f"update {update}"  # vLLM keeps prompts as the adapter before has read them
            return _asked(url, lambda: self._reply(url, asked))

        with ThreadPoolExecutor(AT_ONCE * len(self._own)) as pool:
            try:
                return list(pool.map(reply, range(len(prompts))))
            except TrainingStopped:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def begin(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], update: int
    ) -> Future[list[Reply]]:
        """`generate`, beside what this process does; one after the other."""
        return self._beside.submit(self.generate, prompts, sampling, seeds, update)

    def close(self, wrote: bool = True) -> None:
        """Ask for no more; take away what was written down, where this process did."""
        self._closed = True
        self._beside.shutdown(wait=False, cancel_futures=True)
        if wrote:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _request(self, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
        """All that the server's own defaults would decide is said."""
        return {
            "model": self._name,
            "prompt": list(prompt),
            "n": 1,
            "max_tokens": sampling.max_new_tokens,
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [self._end_id],
            "ignore_eos": True,  # the base's own end, which may be another
            "logprobs": 0,
            "return_token_ids": True,
        }

    def _reply(self, url: str, asked: dict[str, Any]) -> Reply:
        from align.inference.generation import Reply

        try:
            found = ask_json(f"{url}/v1/completions", asked, self._timeout)
        except NoAnswerError as problem:
            if problem.status == _UNKNOWN:  # it was started anew, and knows the policy no more
                self._load(url)
                problem.passing = True
            raise
        try:
            (choice,) = found["choices"]
            ids, logprobs = [int(id) for id in choice["token_ids"]], choice["logprobs"]["token_logprobs"]
            whole = len(ids) == len(logprobs) and 0 < len(ids) <= asked["max_tokens"]
            whole = whole and all(math.isfinite(value) for value in logprobs)
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise NoAnswerError("gave no token_ids with a finite log-probability each")
        return Reply(ids, [float(value) for value in logprobs], ids[-1] == self._end_id)

    def _load(self, url: str) -> None:
        asked = {"lora_name": self._name, "lora_path": str(self._folder), "load_inplace": True}
        ask(f"{url}/v1/load_lora_adapter", asked, self._timeout)


def _asked(url: str, work: Callable[[], FoundT]) -> FoundT:
    """What a server answers, asked again where what is wrong may pass.

    Raises:
        TrainingStopped: nothing that can be used.
    """
    try:
        return patiently(work, RETRIES, WAIT)
    except NoAnswerError as problem:
        said = f": {problem.said}" if problem.said else ""
        raise TrainingStopped(
            f"the server {url} {problem}{said}", code="rollout_failed", hint="mend it; the same command goes on"
        ) from problem
