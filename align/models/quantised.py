"""Model folders whose weights are quantised already: bitsandbytes' 4-bit ones are a base, others are refused by name.

`Load` names a precision; the folder's own decides which of them is possible. No torch.
"""

from __future__ import annotations

from typing import Any

from align.config.schema import Load
from data_prep.core.errors import UserError


def kept_at(model_config: dict[str, Any]) -> Load | None:
    """The precision that a folder's weights are quantised to, by its config.json; None where they are not.

    Raises:
        UserError: a quantisation that cannot be a base here.
    """
    settings = model_config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise UserError("is no object", code="quantised", field="quantization_config", hint="get config.json again")
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown"))
    kind = str(settings.get("bnb_4bit_quant_type") or "fp4")
    if method == "bitsandbytes" and settings.get("load_in_4bit") and kind in ("nf4", "fp4"):
        if settings.get("bnb_4bit_quant_storage") in (None, "uint8"):
            return Load(kind if settings.get("bnb_4bit_use_double_quant") else f"{kind}_single")
        method = f"bitsandbytes 4-bit stored as {settings['bnb_4bit_quant_storage']}"
    elif method == "bitsandbytes":
        method = "bitsandbytes 8-bit" if settings.get("load_in_8bit") else "bitsandbytes"
    bits = f", {settings['bits']} bits" if settings.get("bits") else ""
    raise UserError(
        f"its weights are quantised by {method}{bits}, which adapters cannot be trained on here",
        code="quantised",
        field="quantization_config",
        hint="take the model that was quantised; model.load=nf4 keeps it in 4 bits",
    )


def own_load(model_config: dict[str, Any]) -> Load:
    """The precision at which a folder's weights lose nothing: their own, where nothing else is recorded."""
    kept = kept_at(model_config)
    if kept is not None:
        return kept
    said = str(model_config.get("dtype") or model_config.get("torch_dtype"))
    return Load.bf16 if said.removeprefix("torch.") == "bfloat16" else Load.fp32


def require_kept(model_config: dict[str, Any], load: Load) -> None:
    """A folder that is quantised already is loaded at the precision it is kept at, and at no other.

    Raises:
        UserError: another precision, with the one to set, or a quantisation that cannot be a base here.
    """
    kept = kept_at(model_config)
    if kept is None or (load.four_bit and (load.weights, load.double_quant) == (kept.weights, kept.double_quant)):
        return
    words = [
        *(() if kept.weights == "nf4" else ("adapter.four_bit=fp4",)),
        *(() if kept.double_quant else ("adapter.double_quantization=false",)),
    ]
    raise UserError(
        f"its weights are quantised to {kept.value} already and cannot be loaded as {load.value}",
        code="quantised",
        field="model.load",
        hint=f"set model.load={kept.value}, or {' '.join(['adapter=qlora', *words])}",
    )
