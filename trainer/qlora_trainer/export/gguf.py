"""GGUF files for llama.cpp and what is built on it: the whole model with the adapter merged, or the adapter alone.

Tensors are read, merged, quantized and written one at a time. Names and metadata are those that llama.cpp's own
converter gives; gguf's package knows the names.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from qlora_contract.run_config import GgufType
from qlora_trainer.errors import ModelError
from qlora_trainer.export import k_quants
from qlora_trainer.export.adapter_weights import AdapterWeights
from qlora_trainer.export.gguf_names import (
    GgufNames,
    family_of,
    full_attention_interval,
    rope_of,
    rope_of_windows,
)
from qlora_trainer.export.merged_weights import StoredTensor
from qlora_trainer.export.vocabulary import Vocabulary

# --- types


def tensor_type(form: GgufType, name: str, shape: Sequence[int], config: Any) -> Type:
    """What a tensor is stored as, by llama.cpp's mixture for that form.

    Args:
        form: f16, q8_0 or q4_k_m.
        name: GGUF's.
        shape: (rows, columns), (experts, rows, columns), or (n,), which stays in fp32.
        config: transformers' configuration of the model.
    """
    if len(shape) < 2 or not name.endswith(".weight") or name.split(".")[-2] in _ALWAYS_FP32:
        return Type.F32
    wanted = Type.F16 if form == "f16" else Type.Q8_0 if form == "q8_0" else _mixture(name, config)
    return _that_fits(wanted, shape[-1])


_ALWAYS_FP32 = ("ffn_gate_inp", "ssm_conv1d")
"""The router of experts, and a delta network's convolution: small, and llama.cpp computes them so."""


def _mixture(name: str, config: Any) -> Type:
    """Of q4_k_m: more bits for the head, and for what quantization harms most in some of the layers."""
    layers = config.num_hidden_layers
    if name == "output.weight" or (name == "token_embd.weight" and config.tie_word_embeddings):
        return Type.Q6_K
    kind = name.split(".")[-2]
    if kind in ("attn_v", "ffn_down", "ffn_down_exps"):
        layer = int(name.split(".")[1])
        if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2:
            return Type.Q6_K
    shares_values = config.num_attention_heads != config.num_key_value_heads
    if kind == "attn_v" and config.model_type == "llama" and layers == 80 and shares_values:
        return Type.Q5_K  # 70B: 8 heads share these, which thus are few
    return Type.Q5_K if kind == "attn_qkv" else Type.Q4_K


_SMALLER_BLOCKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


def _that_fits(wanted: Type, columns: int) -> Type:
    """The type itself, or one whose blocks divide a row."""
    for kind in (wanted, _SMALLER_BLOCKS.get(wanted, wanted)):
        if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return Type.F16


def stored_bytes(kind: Type, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a tensor in bytes: its columns as bytes."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return (*shape[:-1], shape[-1] // block * size)


_K_QUANTS: Mapping[Type, Callable[[Tensor], NDArray[np.uint8]]] = {
    Type.Q4_K: k_quants.quantize_q4_k,
    Type.Q5_K: k_quants.quantize_q5_k,
    Type.Q6_K: k_quants.quantize_q6_k,
}


def quantized(name: str, tensor: Tensor, kind: Type) -> NDArray[Any]:
    """A tensor in a type of GGUF's. Raises ModelError for numbers that the type cannot hold."""
    values = tensor.float().contiguous()
    largest = float(values.abs().max())
    if not math.isfinite(largest) or (kind == Type.F16 and largest > k_quants.LARGEST_FP16):
        raise ModelError(f"{name} holds numbers of up to {largest:g}, which {kind.name} cannot hold")
    if kind in _K_QUANTS:
        return _K_QUANTS[kind](values)
    if kind == Type.F32:
        return values.numpy()
    if kind == Type.F16:
        return values.half().numpy()
    written: NDArray[Any] = gguf.quants.quantize(values.numpy(), kind)
    return written


# --- files


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file, not yet made."""

    name: str
    """GGUF's."""
    kind: Type
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    """What it is made of: experts are in a tensor of their layer, one after another. Empty: `value` is it."""
    part: int = 0
    """Which of the tensors that its source is taken apart into."""
    value: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(stored_bytes(self.kind, self.shape))


def plan_model(stored: Sequence[StoredTensor], config: Any, form: GgufType) -> list[PlannedTensor]:
    """The tensors of a model's file. Raises ModelError for one that GGUF does not know."""
    names = GgufNames(config)
    of: dict[tuple[str, int], dict[int, StoredTensor]] = {}
    for each in stored:
        if each.path.endswith("rotary_emb.inv_freq") or (
            config.tie_word_embeddings and each.layer == "lm_head"
        ):
            continue  # computed; the embedding
        if each.trained:
            for part, name in enumerate(names.names(each.path)):
                of.setdefault((name, part), {})[names.expert(each.path) or 0] = each
    tensors = []
    for (name, part), sources in of.items():
        first = sources[0]
        shape = names.shapes(first.path, first.shape)[part]
        if names.expert(first.path) is not None:
            shape = (len(sources), *shape)
        kind = tensor_type(form, name, shape, config)
        tensors.append(PlannedTensor(name, kind, shape, tuple(sources[i] for i in range(len(sources))), part))
    factors = rope_factors(config)
    if factors is not None:
        tensors.append(PlannedTensor("rope_freqs.weight", Type.F32, tuple(factors.shape), (), value=factors))
    return tensors


def write_model(
    path: Path, tensors: Sequence[PlannedTensor], metadata: "Metadata", advance: Callable[[int], None]
) -> Counter[str]:
    """Write a model's GGUF file; how many tensors are of each type.

    Args:
        path: the file.
        tensors: what plan_model returned.
        metadata: what else the file says.
        advance: called with the bytes that were just read; what it raises ends the writing.

    Raises:
        ModelError: a tensor has numbers that its type cannot hold.
    """
    names = GgufNames(metadata.config)
    writer = metadata.writer()
    for tensor in tensors:
        numpy_type = {Type.F32: np.float32, Type.F16: np.float16}.get(tensor.kind)
        shape = tensor.shape if numpy_type else stored_bytes(tensor.kind, tensor.shape)
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(numpy_type or np.uint8), tensor.nbytes, tensor.kind
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            if tensor.value is not None:
                written = quantized(tensor.name, tensor.value, tensor.kind)
            else:
                # An expert at a time is in fp32.
                parts = [
                    quantized(tensor.name, names.to_gguf(of.path, of.value())[tensor.part], tensor.kind)
                    for of in tensor.sources
                ]
                written = parts[0] if len(parts) == 1 else np.stack(parts)
            writer.write_tensor_data(written.view(_Checked))
            # A source that becomes several tensors is read as often: it is done with the first.
            advance(0 if tensor.part else sum(of.nbytes for of in tensor.sources))
    finally:
        writer.close()
    return Counter(tensor.kind.name for tensor in tensors)


def write_lora(path: Path, adapter: AdapterWeights, config: Any, name: str) -> None:
    """Write the adapter alone, in fp32, for `--lora` of llama.cpp. Raises ModelError for a layer that GGUF lacks."""
    names = GgufNames(config)
    writer = gguf.GGUFWriter(None, family_of(config).architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    first = next(iter(adapter.layers.values()))
    # llama.cpp multiplies by alpha / rank, one alpha for all layers and each layer's own rank, whatever the adapter was
    # scaled by: what is left of a layer's scale goes into its B.
    alpha = first.scale * first.rank
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for layer, added in adapter.layers.items():
        weight = f"{layer}.weight"
        a = names.columns_to_gguf(weight, added.a).numpy()
        b = names.rows_to_gguf(weight, added.b * (added.scale * added.rank / alpha))
        for each, part in zip(names.names(weight), names.split(weight, b), strict=True):
            writer.add_tensor(f"{each}.lora_a", a.view(_Checked))
            writer.add_tensor(f"{each}.lora_b", part.numpy().view(_Checked))
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


class _Checked(np.ndarray[Any, Any]):
    """An array that Python's own files write, which say why they could not. numpy's way, by which the package writes
    tensors, loses that, and of small ones the failure itself."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:  # noqa: A002, ARG002 - numpy.s
        """Write the numbers."""
        fid.write(np.ascontiguousarray(self).data)


@dataclass(frozen=True)
class Metadata:
    """What a model's file says of the model, besides its tensors."""

    name: str
    config: Any
    """transformers' configuration."""
    form: GgufType
    vocabulary: Vocabulary
    chat_template: str | None
    special: Mapping[str, int]
    """`bos`, `eos`, `eot`, `unk`, `pad` -> id, as far as there are any."""

    def writer(self) -> gguf.GGUFWriter:
        """A writer that has taken all of it."""
        config, writer = self.config, gguf.GGUFWriter(None, family_of(self.config).architecture)
        head = head_size(config)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(
            {
                "f16": gguf.LlamaFileType.MOSTLY_F16,
                "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
                "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
            }[self.form]
        )
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(context_length(config))
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(
            config.shared_intermediate_size
            if config.model_type == "granitemoehybrid"
            else config.intermediate_size
        )
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(int(head * rope_of(config).get("partial_rotary_factor", 1.0)))
        self._add_rope(writer)
        self._add_special_to_family(writer)
        self._add_vocabulary(writer)
        return writer

    def _add_special_to_family(self, writer: gguf.GGUFWriter) -> None:
        config, kind = self.config, self.config.model_type
        if family_of(config).full_every is not None:
            writer.add_sliding_window(config.sliding_window)
        if kind in ("granite", "granitemoehybrid"):
            writer.add_attention_scale(config.attention_multiplier)
            writer.add_embedding_scale(config.embedding_multiplier)
            writer.add_residual_scale(config.residual_multiplier)
            writer.add_logit_scale(config.logits_scaling)
        if kind == "granitemoehybrid" and config.position_embedding_type != "rope":
            writer.add_rope_scaling_finetuned(value=False)  # there, how it is told that nothing is rotated
        if kind == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if kind == "ministral3":
            rope = rope_of(config)
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
            writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
        if kind == "qwen3_moe":
            writer.add_expert_count(config.num_experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if kind == "qwen3_5_text":
            values = config.linear_num_value_heads
            writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
            writer.add_ssm_state_size(config.linear_key_head_dim)
            writer.add_ssm_group_count(config.linear_num_key_heads)
            writer.add_ssm_time_step_rank(values)
            writer.add_ssm_inner_size(values * config.linear_value_head_dim)
            writer.add_full_attention_interval(full_attention_interval(config))
            sections = rope_of(config).get("mrope_section") or MROPE_SECTIONS
            writer.add_rope_dimension_sections([*sections, 0])

    def _add_rope(self, writer: gguf.GGUFWriter) -> None:
        rope, windows = rope_of(self.config), rope_of_windows(self.config)
        writer.add_rope_freq_base(rope["rope_theta"])
        if windows is not None:
            writer.add_rope_freq_base_swa(windows["rope_theta"])
        if rope.get("rope_type") not in ("linear", "yarn"):
            return  # llama3's is a tensor
        linear = rope["rope_type"] == "linear"
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if linear else gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        if not linear:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    def _add_vocabulary(self, writer: gguf.GGUFWriter) -> None:
        vocabulary = self.vocabulary
        writer.add_tokenizer_model(vocabulary.model)
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
        if vocabulary.scores:
            writer.add_token_scores(vocabulary.scores)
        if vocabulary.merges:
            writer.add_token_merges(vocabulary.merges)
        writer.add_add_bos_token(vocabulary.add_bos)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
        add = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "eot": writer.add_eot_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
        }
        for role, id_ in self.special.items():
            add[role](id_)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


MROPE_SECTIONS = (11, 11, 10)
"""Of Qwen3.5, where config.json does not say it: which rotary pairs belong to time, height and width."""


def head_size(config: Any) -> int:
    """Numbers of a head's query."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(config: Any) -> int:
    """Tokens up to which the file computes what the model does: llama.cpp has a sliding window for some families."""
    longest = int(config.max_position_embeddings)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else config.model_type in ("mistral", "phi3")
    if family_of(config).full_every is not None:
        return longest
    window = getattr(config, "sliding_window", None)
    return min(longest, int(window)) if slides and window else longest


def rope_factors(config: Any) -> Tensor | None:
    """What llama3's rotary embeddings divide each frequency by: (head size / 2,) fp32. None for other kinds.

    Long waves are stretched by the factor, short ones not at all, those between by a mean of both.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    steps = torch.arange(0, head_size(config), 2, dtype=torch.float64) / head_size(config)
    turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** steps)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = (1 / (share + (1 - share) / rope["factor"])).float()
    return factors
