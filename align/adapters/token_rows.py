"""Tokens whose rows of the embedding and of the output head are trained beside an adapter's own tensors.

A token that was added to a tokenizer stands for a row that no text has trained, and a low-rank term leaves that row as
it is. peft keeps the rows apart from the weight and puts them in on the way (`trainable_token_indices`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from align.models.tokenizer import open_tokenizer
from data_prep.core.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIELD = "adapter.trainable_tokens"


def token_rows(tree: PreTrainedModel, tokens: Sequence[str]) -> dict[str, list[int]]:
    """Name of the embedding, and of a head with weights of its own -> the ids of the tokens, rising.

    Raises:
        UserError: the tokenizer does not have one of them as a single token, or the head has a bias.
    """
    ids = ids_of(open_tokenizer(vars(tree)["align_shared"]["folder"]), tokens)
    if biased := head_with_bias(tree):
        raise biased
    names = {id(module): name for name, module in tree.named_modules()}
    return {names[id(end)]: ids for end in _ends(tree)}


def head_with_bias(model: Any) -> UserError | None:
    """What is wrong with a model whose output head has a bias."""
    if getattr(model.get_output_embeddings(), "bias", None) is None:
        return None
    return UserError(
        "this model's output head has a bias, with which rows cannot be trained apart",
        field=FIELD,
        code="bad_value",
        hint="adapter=full trains them",
    )


def numbers_per_token(model: Any) -> int:
    """How many parameters the rows of one token have."""
    return sum(int(end.weight.shape[1]) for end in _ends(model))


def _ends(model: Any) -> list[Any]:
    """The embedding, and the output head where the two are not one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head.weight is embedding.weight else [embedding, head]


def ids_of(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """The ids of tokens, rising.

    Raises:
        UserError: the tokenizer does not have one of them as a single token.
    """
    known = tokenizer.get_vocab()
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    for token in tokens:
        if token not in known:
            near = nearest(token, added)
            raise UserError(
                f"the tokenizer has no token {token!r}" + (f" (did you mean {near!r}?)" if near else ""),
                field=FIELD,
                code="bad_value",
                hint="add it to the tokenizer and the model first: tokenizer.add_tokens, model.resize_token_embeddings",
            )
    return sorted({int(known[token]) for token in tokens})
