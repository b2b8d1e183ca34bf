"""Virtual tokens in front of every row: what soft-prompt methods put into a tree, read by the forward passes alone.

A lead is a submodule of its tree. Virtual tokens see no real one, so a packed batch computes them once for all rows.

Shape suffixes: P virtual tokens, D width, K key-value heads, H head width, N packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align.models.packing import Memory, Packed


class Lead(nn.Module):
    """P virtual tokens; each of the two kinds below fills in what it has."""

    tokens: int
    prompt_embeddings: nn.Parameter

    def flat(self) -> Tensor:
        """What the adapter file holds: a row per virtual token."""
        return self.prompt_embeddings

    def before(self, tree: Any, packed: Packed) -> tuple[dict[str, Tensor], Packed, int]:
        """Inputs and packed batch of a forward, and how many outputs at its start are not of real tokens."""
        raise NotImplementedError

    def memory(self) -> Memory:
        """Keys and values [K, P, H] that every layer sees before its own, layer by layer; may be empty."""
        return ()


class LeadingEmbeddings(Lead):
    """Trained input embeddings: rows become P tokens longer."""

    def __init__(self, embeddings_PD: Tensor) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(embeddings_PD)
        self.tokens = embeddings_PD.shape[0]

    def before(self, tree: Any, packed: Packed) -> tuple[dict[str, Tensor], Packed, int]:
        """The P embeddings once, then the packed tokens'."""
        own_ND = tree.get_input_embeddings()(packed.ids_1N)[0]
        together = torch.cat([self.prompt_embeddings.to(own_ND.dtype), own_ND])
        return {"inputs_embeds": together[None]}, packed.after(self.tokens), self.tokens


class LeadingMemory(Lead):
    """Trained keys and values of every layer, as they are or made by a small network while training."""

    def __init__(self, flat: Tensor, shape: tuple[int, int, int], network: nn.Module | None = None) -> None:
        """`flat` is [P, layers * 2 * K * H] as in peft, or a network's input; `shape` is (layers, K, H)."""
        super().__init__()
        self.prompt_embeddings = nn.Parameter(flat)
        self.network = network
        self.shape = shape
        self.tokens = flat.shape[0]

    def flat(self) -> Tensor:
        """Keys and values as peft stores them, [P, layers * 2 * K * H]."""
        return self.prompt_embeddings if self.network is None else self.network(self.prompt_embeddings)

    def before(self, tree: Any, packed: Packed) -> tuple[dict[str, Tensor], Packed, int]:
        """The packed tokens alone, each P positions later, with the memory beside them."""
        return {"input_ids": packed.ids_1N}, packed.remembering(self.tokens, self.memory()), 0

    def memory(self) -> Memory:
        """(key, value) of every layer, [K, P, H] each."""
        layers, heads, width = self.shape
        parts_KPH = self.flat().view(self.tokens, 2 * layers, heads, width).permute(1, 2, 0, 3)
        return tuple((parts_KPH[i], parts_KPH[i + 1]) for i in range(0, 2 * layers, 2))


def put_before(tree: nn.Module, lead: Lead) -> None:
    """Make `lead` the tree's own."""
    tree.add_module("lead", lead)


def lead_of(tree: nn.Module) -> Lead | None:
    """The tree's virtual tokens, if it has any."""
    found: Lead | None = getattr(tree, "lead", None)
    return found
