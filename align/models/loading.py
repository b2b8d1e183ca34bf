"""The one way weights come into memory: a folder holds the tensors of its architecture, or it is refused by name.

transformers fills tensors that it does not find with random numbers, leaves out those that it does not know, and goes
on. Here every base, fully tuned checkpoint and stock classifier comes through `load_weights`, and `inspect_weights`
knows the same from the files' headers, on the meta device. Names that a wrapper has lengthened (`torch.compile`, DDP,
FSDP, peft, TRL) are shortened, which is said. Buffers that an architecture is known to leave in files, and heads that
are tied to the embedding, are no difference.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from align.config.schema import Load
from align.models.fingerprint import check_weight_files, read_model_config, tensor_types
from align.models.memory import OutOfMemory, is_out_of_memory
from align.models.packing import ATTENTION
from align.models.quantised import kept_at
from data_prep.core.errors import UserError, said_by

_WRAPPERS = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)"
_RENAMES = {
    rf"^(?:(?:{_WRAPPERS}|module|base_model\.model|pretrained_model)\.)+": "",
    rf"\.(?:{_WRAPPERS}\.)+": ".",
    rf"\.(?:{_WRAPPERS}\.)+(?=.)": ".",  # a second place in one name
}
"""Pattern -> what it becomes: names that wrappers of a model leave in its state dict."""
_FRACTIONS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types of weights, as safetensors calls them; numbers of others mean something else, such as steps of a scale."""
_MISUSED = (ValueError, KeyError, AttributeError, TypeError, RuntimeError)
_REFUSALS: tuple[type[Exception], ...] = (*_MISUSED, OSError, SafetensorError, StrictDataclassError)
"""What transformers and safetensors end in on a folder that they cannot use."""
_SCORES = re.compile(r"^(score|classifier|v_head|value_head|reward_head|regression_head)\.")
"""Heads of reward models and critics, which a language model has no use for."""


def load_weights(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model of a folder with exactly the folder's tensors; only safetensors, never code from the folder.

    Args:
        auto: the class of transformers that picks the model.
        options: of `from_pretrained`: dtype, device_map, attn_implementation, quantization_config.

    Returns:
        The model, and what must be said of it, a line each.

    Raises:
        UserError: tensors are missing, left over, of another shape, not finite or twice there, or the architecture is
            not supported.
    """
    model, notes = _loaded(folder, auto, options)
    _require_one_head(model, folder)
    _require_finite(model, folder)
    return model, notes


def inspect_weights(folder: Path, auto: Any = AutoModelForCausalLM) -> list[str]:
    """What `load_weights` would say or refuse of the names and shapes in a folder's headers; no weight is read.

    Raises:
        UserError: as `load_weights`, where names and shapes tell.
    """
    if (kept := kept_at(read_model_config(folder))) is not None:
        check_weight_files(folder)
        _require_packed(tensor_types(folder), kept, folder)
        return []  # packed weights have shapes of their own; they are compared as they are loaded
    attention = {"attn_implementation": ATTENTION} if auto is AutoModelForCausalLM else {}
    return _loaded(folder, auto, {"device_map": "meta", **attention})[1]


def _loaded(folder: Path, auto: Any, options: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    check_weight_files(folder)
    types, kept = tensor_types(folder), kept_at(read_model_config(folder))
    if kept is not None:
        _require_packed(types, kept, folder)
    names = [name for name, _ in types]
    renames = {name: new for name in names if (new := _plain(name)) != name}
    if renames:
        options = {**options, "key_mapping": _RENAMES}
    try:
        with _silence():
            model, info = auto.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are told below, all of them, by name
                output_loading_info=True,
                **options,
            )
    except _REFUSALS as error:
        if is_out_of_memory(error):
            raise OutOfMemory(hint="keep the weights in fewer bits: model.load=bf16, or nf4") from None
        raise _unsupported(folder, error) from error
    _forget(model)
    plain = [renames.get(name, name) for name in names]
    notes = _renamed(renames) + _prefixed(plain, model)
    _require_once(plain, model.base_model_prefix, folder)
    notes += _require_fit(model, info, folder)
    if kept is None:
        _require_fractions(model, dict(zip(plain, (kind for _, kind in types), strict=True)), folder)
    return model, notes


@contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers from reporting what is told here, and from showing a bar of its own."""
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _plain(name: str) -> str:
    """The name without what wrappers put into it."""
    for pattern, put in _RENAMES.items():
        name = re.sub(pattern, put, name, count=1)
    return name


def _forget(model: PreTrainedModel) -> None:
    """What is saved of the model has plain names and plain weights: transformers would wrap and pack them again."""

    def ours(step: Any) -> bool:
        packing = (type(operation).__module__ for operation in getattr(step, "operations", ()))
        return bool(set(_RENAMES) & set(step._original_source_patterns)) or any("bitsandbytes" in at for at in packing)

    vars(model)["_weight_conversions"] = [
        step for step in vars(model).get("_weight_conversions") or [] if not ours(step)
    ]


def _renamed(renames: dict[str, str]) -> list[str]:
    if not renames:
        return []
    first = next(iter(renames))
    return [f"{len(renames)} tensors have names of a wrapped model: {first} is read as {renames[first]}"]


def _prefixed(names: list[str], model: PreTrainedModel) -> list[str]:
    """What transformers itself mends: the name of the backbone in front, missing or once too often."""
    prefix = f"{model.base_model_prefix}."
    own = model.state_dict().keys()
    lacking = [name for name in names if name not in own and prefix + name in own]
    doubled = [name for name in names if name not in own and name.removeprefix(prefix) in own]
    return [
        f"{len(found)} tensors have {what} '{prefix}' and are read {how}: {found[0]}"
        for found, what, how in ((lacking, "no", "with it"), (doubled, "a further", "without it"))
        if found
    ]


def _require_once(names: list[str], prefix: str, folder: Path) -> None:
    """No two tensors of the files stand for one of the model: which of them counted would be chance."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    known = set(names)
    twice += [name for name in names if f"{prefix}.{name}" in known]
    if twice:
        raise UserError(
            f"two tensors have one name ({len(twice)} of them; first: {twice[0]})",
            code="wrong_weights",
            file=str(folder),
            hint="keep one: the folder holds two copies of a model, or half of a wrapped one",
        )


def _require_fit(model: PreTrainedModel, info: dict[str, Any], folder: Path) -> list[str]:
    """Nothing missing, left over or of another shape; a head for scores on a language model is left out and said."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    wrong = sorted((name, list(got), list(wanted)) for name, got, wanted in info["mismatched_keys"])
    scores = [name for name in unexpected if _SCORES.match(name)]
    if scores == unexpected and not missing and not wrong:
        return [f"left out, as a language model has no head for scores: {', '.join(scores)}"] if scores else []
    details = [
        *(f"missing, and would be random numbers: {name}" for name in missing),
        *(f"left over, and would not be read: {name}" for name in unexpected),
        *(f"of another shape: {name} is {got} in the files, {wanted} by config.json" for name, got, wanted in wrong),
    ]
    counts = f"{len(missing)} missing, {len(unexpected)} left over, {len(wrong)} of another shape"
    raise UserError(
        f"its tensors are not those of a {type(model).__name__} ({counts}; first {details[0]})",
        code="wrong_weights",
        file=str(folder),
        hint=_advice(model, missing, scores),
        details=details[:10],
    )


def _advice(model: PreTrainedModel, missing: list[str], scores: list[str]) -> str:
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if head is not None and {name.rpartition(".")[0] for name in missing} == {head}:
        what = "a reward model or classifier" if scores else "a model without its head"
        return f"this is {what}, which cannot speak: take the language model that it was made from"
    return "get the folder again, or the config.json that belongs to these weights"


def _require_packed(types: list[tuple[str, str]], kept: Load, folder: Path) -> None:
    """Every weight that is packed in 4 bits has the state that unpacks it, and there are such weights."""
    names = {name for name, _ in types}
    state = f".quant_state.bitsandbytes__{kept.weights}"
    packed = [name for name, kind in types if kind == "U8" and name.endswith(".weight")]
    lost = [name for name in packed if name + state not in names]
    if lost or not packed:
        what = f"{len(lost)} have no state of {kept.weights} (first: {lost[0]})" if lost else "none is packed"
        raise UserError(
            f"config.json says that its weights are quantised to {kept.value}, but {what}",
            code="wrong_weights",
            file=str(folder),
            hint="get the folder again, or the config.json that belongs to these weights",
        )


def _require_fractions(model: PreTrainedModel, types: dict[str, str], folder: Path) -> None:
    """No weight is kept as whole numbers: without the scales of their quantisation they would be read as they stand."""
    prefix = f"{model.base_model_prefix}."
    own = {name.removeprefix(prefix) for name, _ in model.named_parameters()}
    whole = [name for name, kind in types.items() if kind not in _FRACTIONS and name.removeprefix(prefix) in own]
    if whole:
        raise UserError(
            f"{len(whole)} of its weights are kept as {types[whole[0]]} (first: {whole[0]}), and config.json names no "
            "quantisation",
            code="wrong_weights",
            file=str(folder),
            hint="take the model that was quantised",
        )


def _require_one_head(model: PreTrainedModel, folder: Path) -> None:
    """A head that config.json ties to the embedding is that in the files too: which of them counted would be chance."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if head is None or not tied or head.weight is embedding.weight or torch.equal(head.weight, embedding.weight):
        return
    raise UserError(
        "config.json ties the head to the embedding, but the files hold another head",
        code="wrong_weights",
        file=str(folder),
        hint="set tie_word_embeddings to false in config.json if the head is to count, or take its tensor out",
    )


def _require_finite(model: PreTrainedModel, folder: Path) -> None:
    """Every weight is a number, the scales of quantised ones too."""
    bad: list[str] = []
    for name, parameter in model.named_parameters():
        parts = [parameter, *state_tensors(getattr(parameter, "quant_state", None))]
        if not all(bool(torch.isfinite(part).all()) for part in parts if part.is_floating_point()):
            bad.append(name)
    if bad:
        raise UserError(
            f"the weights are not all numbers: NaN or infinite in {len(bad)} of the tensors (first: {bad[0]})",
            code="not_finite",
            file=str(folder),
            hint="get the folder again, or take a state from before its training failed",
            details=bad[:10] if len(bad) > 1 else (),
        )


def state_tensors(state: Any) -> list[torch.Tensor]:
    """The tensors of a parameter's quantisation state, and of the state of its scales."""
    if state is None:
        return []
    own = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    return own + state_tensors(getattr(state, "state2", None))


def _unsupported(folder: Path, error: BaseException) -> UserError:
    kind = read_model_config(folder).get("model_type")
    reason = said_by(error)
    if isinstance(error, KeyError) and ATTENTION in error.args:
        reason = "its attention cannot be replaced, so rows cannot be packed"
    if isinstance(error, RuntimeError | OSError | SafetensorError):
        said, code = f"the weights cannot be read as a {kind} ({reason})", "wrong_weights"
    else:
        said, code = f"architecture {kind} is not supported ({reason})", "unsupported_architecture"
    return UserError(said, code=code, file=str(folder))
