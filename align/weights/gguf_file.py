"""`align ship to=gguf`: merged weights of a Llama-like model as one GGUF file, as llama.cpp reads it.

llama.cpp turns pairs of neighbouring channels in Llama's attention and halves in Qwen's, so that Llama's query and key
rows change places. What is written is read again by `gguf`, tensor by tensor, and by transformers, whose logits count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from align.inference.loaded import Opened
from align.models.fingerprint import read_model_config
from align.weights.drift import measure, of_model, of_role
from align.weights.gguf_tokenizer import add_tokenizer, begins, parts_of, splitting
from align.weights.merge import merged_model
from align.weights.options import Precision
from align.weights.output import ALONE, Compared
from data_prep.core.errors import UserError

FILE = "model.gguf"
_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BIASES = {f"self_attn.{one}_proj.bias": f"attn_{one}.bias" for one in "qkv"}
_NORMS = {f"self_attn.{one}_norm.weight": f"attn_{one}_norm.weight" for one in "qk"}


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp expects of a `model_type`, which it has by the same name."""

    more: dict[str, str]
    """Tensors of a block beside the usual ones."""
    neighbours: bool
    """Whether it turns neighbouring channels, so that rows of queries and keys change places."""


ARCHITECTURES = {
    "llama": _Architecture({}, True),
    "qwen2": _Architecture(_BIASES, False),
    "qwen3": _Architecture(_NORMS, False),
}


def require_covered(opened: Opened) -> None:
    """Refuse an architecture or a tokenizer that is not covered, before weights load."""
    config = read_model_config(opened.base_folder)
    kind = str(config.get("model_type"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turned = rope.get("rope_type", rope.get("type", "default"))
    biased = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    problem = None
    if kind not in ARCHITECTURES:
        problem = f"the architecture {kind} is not covered ({', '.join(ARCHITECTURES)} are)"
    elif turned != "default":
        problem = f"rotary positions of the kind {turned} are not covered"
    elif config.get("use_sliding_window") or {*(config.get("layer_types") or ())} - {"full_attention"}:
        problem = "attention in a sliding window is not covered"
    elif biased or config.get("hidden_act", "silu") != "silu":
        problem = f"{biased[0] if biased else config['hidden_act']} is not covered"
    if problem:
        raise UserError(f"no GGUF of this model: {problem}", code="not_for_gguf", hint="to=folder or to=vllm writes it")
    splitting(parts_of(opened.tokenizer))
    begins(opened.tokenizer)


def write_gguf(opened: Opened, folder: Path, precision: Precision, bare: bool = False) -> None:
    """The merged model with its tokenizer as one file, every tensor read back; `bare` as of the tokenizer.

    Raises:
        UserError: a tensor that the architecture does not have, or one that fp16 cannot hold.
    """
    model = merged_model(opened)
    kind = str(model.config.model_type)
    tensors = {name: _rounded(value, name, precision) for name, value in _tensors(model, kind).items()}
    writer = gguf.GGUFWriter(folder / FILE, kind)
    _describe(writer, model.config, opened.checkpoint.label)
    half = precision is Precision.fp16
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    rows = len(tensors["token_embd.weight"])
    add_tokenizer(writer, opened.tokenizer, opened.renderer.end_token_id, rows, bare)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / FILE).tensors}
    wrong = [name for name in {*read, *tensors} if not _same(read.get(name), tensors.get(name))]
    if wrong:
        raise UserError(f"read back, {min(wrong)} is not what was written", file=FILE, code="not_reproduced")


def compare_gguf(opened: Opened, folder: Path) -> Compared:
    """The file as stock transformers reads it against the trained role, row by row."""
    model = opened_by_transformers(folder)
    torch.nn.Module.to(model, opened.role.tree.device)
    return {ALONE: measure(of_role(opened.role), of_model(model), opened.rows())}


def opened_by_transformers(folder: Path) -> PreTrainedModel:
    """The model of a file; of some architectures transformers does not read the width of a head."""
    config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    fields = gguf.GGUFReader(folder / FILE).fields
    config.head_dim = int(fields[f"{config.model_type}.attention.key_length"].contents())
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    found.eval()
    return found


def _tensors(model: PreTrainedModel, kind: str) -> dict[str, np.ndarray]:
    """The model's tensors by llama.cpp's names, in its order of rows."""
    found, config = {}, model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = model.state_dict()
    for name, value in weights.items():
        if name == "lm_head.weight" and torch.equal(value, weights["model.embed_tokens.weight"]):
            continue  # llama.cpp takes the embedding where there is no other
        theirs, array = _name(name, kind), value.float().cpu().numpy()
        layer = theirs.split(".")[-2]
        if ARCHITECTURES[kind].neighbours and layer in heads:
            array = neighbouring(array, heads[layer])
        found[theirs] = array
    return found


def neighbouring(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys with the two channels of a rotation, half a head apart, put side by side."""
    halves: np.ndarray = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    paired: np.ndarray = halves.swapaxes(1, 2).reshape(rows.shape)
    return paired


def _name(name: str, kind: str) -> str:
    """llama.cpp's name of a tensor.

    Raises:
        UserError: it has none.
    """
    block = {**_BLOCK, **ARCHITECTURES[kind].more}
    if name in _ENDS:
        return _ENDS[name]
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    if not name.startswith("model.layers.") or rest not in block:
        raise UserError(f"no GGUF of this model: its tensor {name} is not covered", code="not_for_gguf")
    return f"blk.{number}.{block[rest]}"


def _rounded(value: np.ndarray, name: str, precision: Precision) -> np.ndarray:
    """A tensor in the precision of the file, where llama.cpp wants vectors in float32."""
    if precision is not Precision.fp16 or value.ndim < 2:
        return value
    if np.abs(value).max() > np.finfo(np.float16).max:
        raise UserError(f"fp16 cannot hold {name}", field="load", hint="use load=fp32", code="overflow")
    return value.astype(np.float16)


def _describe(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    """Sizes and constants."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _same(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    return first is not None and second is not None and first.dtype == second.dtype and np.array_equal(first, second)
