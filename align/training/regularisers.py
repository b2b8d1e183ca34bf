"""What holds training back, whatever the method: weight decay by group, noise on embeddings, penalties on drift.

    noise      e' = e + alpha / sqrt(L d) u, u uniform in [-1, 1), L tokens of the row, d width
               "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv 2310.05914, algorithm 1
    embedding  w / 2 |E - E0|^2, summed over the table
               "Explicit Inductive Bias for Transfer Learning with Convolutional Networks" (L2-SP), arXiv 1802.01483
    hidden     w times the mean over places and width of (h - h0)^2, last layer, at the places that the loss reads
               "DELTA: Deep Learning Transfer using Feature Map with Attention", arXiv 1901.09229, there with learnt
               weights of channels and on every layer

E0 and h0 are those of what the stage starts from, on a frozen tree over the same base. All of it happens in forwards of
training alone: an objective in evaluation mode, rollouts and scores never see it. Cost: decay and noise none, `hidden`
one more forward without gradients, `embedding` a pass over the table.

Shape suffixes: N packed tokens, D width, K places that the loss reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from align.adapters.layers.private_weights import is_norm
from align.models.packing import Packed
from align.roles import Role
from align.training.objectives import Objective
from align.training.options import TrainingOptions


def regularise(objective: Objective, role: Role, options: TrainingOptions, start: Callable[[], Role]) -> None:
    """Let an objective add what the options ask for to the training of `role`; `start` makes its frozen start."""
    drifts = bool(options.embedding_drift or options.hidden_drift)
    if options.neftune or drifts:
        Regulariser(role, options, start() if drifts else None).attach(objective)


@dataclass
class Regulariser:
    """Noise and penalties around the loss of one role, by hooks on its objective."""

    role: Role
    options: TrainingOptions
    start: Role | None
    """The frozen function that the role started from; needed by the penalties."""
    _open: ExitStack = field(default_factory=ExitStack)
    _hidden: list[Tensor] = field(default_factory=list)

    def attach(self, objective: Objective) -> Objective:
        """Let it act in every forward of training."""
        objective.register_forward_pre_hook(self._begin)
        objective.register_forward_hook(self._end, always_call=True)
        return objective

    def _begin(self, objective: nn.Module, given: tuple[Any, ...]) -> None:
        if objective.training:
            self._open.enter_context(self._noise(given[0].packed))
            self._hidden = self._open.enter_context(self._kept())

    def _end(self, objective: nn.Module, given: tuple[Any, ...], out: Any) -> Any:
        """The summed loss of a micro-batch with penalties; its numbers, where `loss` is the loss without them."""
        self._open.close()
        hidden, self._hidden = self._hidden, []
        if not hidden or out is None:  # evaluation, a role that rests in this forward, or a forward that has failed
            return out
        (batch,), (loss, numbers) = given, out
        penalties = {}
        if self.options.hidden_drift:
            penalties["penalty/hidden_drift"] = self.options.hidden_drift * self._hidden_drift(hidden[0], batch)
        if self.options.embedding_drift:
            penalties["penalty/embedding_drift"] = self.options.embedding_drift * self._embedding_drift() * batch.weight
        told = {name: value.detach() for name, value in penalties.items()}
        return loss + sum(penalties.values()), {"loss": loss.detach(), **numbers, **told}

    def _hidden_drift(self, hidden_ND: Tensor, batch: Any) -> Tensor:
        """Mean squared distance from the start's hidden states, summed over the units of the loss."""
        assert self.start is not None
        index_K, share_K = batch.read()
        with torch.no_grad():
            start_KD = self.start.hidden(batch.packed)[index_K]
        own_KD = hidden_ND[-batch.packed.tokens :][index_K]  # virtual tokens stand first
        each_K = (own_KD.float() - start_KD.float()).square().mean(-1)
        total: Tensor = (each_K * share_K).sum()
        return total

    def _embedding_drift(self) -> Tensor:
        """Half the squared distance of the embedding table from the start's."""
        assert self.start is not None
        own: Any = self.role.tree.get_input_embeddings()
        start: Any = self.start.tree.get_input_embeddings()
        change_VD: Tensor = own.weight.float() - start.weight.detach().float()
        return change_VD.square().sum() / 2

    @contextmanager
    def _kept(self) -> Iterator[list[Tensor]]:
        """The last hidden states of the forwards inside, [N, D] each."""
        kept: list[Tensor] = []
        tree = self.role.tree
        backbone = getattr(tree, tree.base_model_prefix)
        hook = backbone.register_forward_hook(lambda _, __, out: kept.append(out.last_hidden_state[0]))
        try:
            yield kept
        finally:
            hook.remove()

    @contextmanager
    def _noise(self, packed: Packed) -> Iterator[None]:
        """Noise on the embeddings of packed tokens, in the forwards inside."""
        if not self.options.neftune:
            yield
            return
        lengths_N = packed.layout.lengths_N()

        def noisy(_: Any, __: Any, out_1ND: Tensor) -> Tensor:
            size_N = self.options.neftune / (lengths_N * out_1ND.shape[-1]).sqrt()
            return out_1ND + torch.empty_like(out_1ND).uniform_(-1, 1) * size_N[:, None].to(out_1ND.dtype)

        hook = self.role.tree.get_input_embeddings().register_forward_hook(noisy)
        try:
            yield
        finally:
            hook.remove()


def decayed(role: Role, groups: list[dict[str, Any]], options: TrainingOptions) -> list[dict[str, Any]]:
    """Optimiser groups, each cut into those parts of its parameters that have weight decays of their own.

    Biases and norms take `norm_decay`; of the rest, the score head `head_decay`, the embedding table
    `embedding_decay`, and everything else `weight_decay`, which also stands for what is not set.
    """
    head = set(map(id, role.head.parameters())) if role.head is not None else set()
    table = id(role.tree.get_input_embeddings().weight)
    small = {id(p) for m in role.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    small |= {id(p) for name, p in role.named_parameters() if name.endswith("bias")}

    def decay(parameter: Tensor) -> float:
        if id(parameter) in small:
            return options.norm_decay
        own = options.head_decay if id(parameter) in head else None
        own = options.embedding_decay if id(parameter) == table else own
        return options.weight_decay if own is None else own

    parts = []
    for group in groups:
        by_decay: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            by_decay.setdefault(decay(parameter), []).append(parameter)
        parts += [{**group, "params": found, "weight_decay": value} for value, found in by_decay.items()]
    return parts
