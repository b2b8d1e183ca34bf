"""Shapes of an architecture, read off its modules on the meta device: exact for every model, and no weight is made."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from align.adapters.targets import chosen
from data_prep.core.errors import UserError, nearest, said_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def whole_config_of(model_config: dict[str, Any]) -> Any:
    """transformers' configuration object of a `config.json`; code that the file names is never run.

    Raises:
        UserError: no `model_type`, one that this version of transformers does not know, or fields that it refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    kind = model_config.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        near = nearest(str(kind), CONFIG_MAPPING_NAMES)
        hint = f"did you mean '{near}'?" if near else "is transformers too old for it?"
        raise UserError(f"architecture {kind} is not known here", code="unsupported_architecture", hint=hint)
    try:
        return AutoConfig.for_model(**model_config)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = said_by(error)
        raise UserError(f"config.json of a {kind} cannot be used ({reason})", code="bad_model_config") from error


def config_of(model_config: dict[str, Any]) -> Any:
    """transformers' configuration of the language model that a `config.json` describes."""
    return whole_config_of(model_config).get_text_config()


def require_decoder(model_config: dict[str, Any]) -> None:
    """Refuse what can be counted but not trained here.

    Raises:
        UserError: an encoder, an encoder with a decoder, or a model whose rows cannot be packed.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    config = whole_config_of(model_config)
    if config.is_encoder_decoder or not _speaks(config) or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(
            f"a {config.model_type} is no causal language model",
            code="unsupported_architecture",
            hint="`align count` counts it; training takes decoders such as llama, qwen3 or gpt2",
        )
    speaking: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if speaking._is_stateful:
        raise UserError(
            f"architecture {config.model_type} is not supported (a state runs on from row to row)",
            code="unsupported_architecture",
            hint="training takes decoders with attention alone, such as llama, qwen3 or gpt2",
        )


def base_parameters(model_config: dict[str, Any]) -> int:
    """Number of parameters of the model that a `config.json` describes; tied weights count once."""
    return sum(parameter.numel() for parameter in meta_model(model_config).parameters())


def linear_layers(model: Any) -> dict[str, Any]:
    """Full name -> module of every linear layer of a model, its language-model head excepted."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear | Conv1D) and m is not head}


def linear_shapes(model_config: dict[str, Any], targets: Any, layers: Any = "all") -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of the linear layers that the options select.

    Raises:
        UserError: they select none.
    """
    linear = linear_layers(meta_model(model_config))
    return {name: _shape(linear[name]) for name in chosen(list(linear), targets, layers)}


def meta_model(model_config: dict[str, Any]) -> PreTrainedModel:
    """The model that a `config.json` describes, on the meta device; shared, so not to be changed.

    It is the causal language model, the encoder-decoder, or an encoder without a head.
    """
    return _meta_model(_key(model_config))


def _shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer; GPT-2's keeps its weight transposed."""
    rows, columns = module.weight.shape
    return (rows, columns) if hasattr(module, "out_features") else (columns, rows)


def _key(model_config: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in model_config.items() if k != "quantization_config"}, sort_keys=True)


@lru_cache(maxsize=8)
def _meta_model(key: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    fields = json.loads(key)
    config = whole_config_of(fields)
    kind: Any = AutoModelForCausalLM if _speaks(config) else AutoModel
    try:
        with torch.device("meta"):
            model: PreTrainedModel = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else kind).from_config(config)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = said_by(error)
        raise UserError(
            f"architecture {config.model_type} cannot be counted here ({reason})", code="unsupported_architecture"
        ) from error
    return model


def _speaks(config: Any) -> bool:
    """Whether transformers has a causal language model of this configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
