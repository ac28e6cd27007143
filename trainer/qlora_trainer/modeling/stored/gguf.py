"""GGUF: llama.cpp's files. The package gguf reads and dequantizes them; transformers translates what they say of the
model where there is no config.json."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_contract.units import first_line
from qlora_trainer.errors import ModelError

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are numbers as they are."""
AT_ONCE = 1 << 20
"""Weights that are dequantized at once: numpy makes several copies of them meanwhile."""

ARCHITECTURES = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False}
"""Those that are read -> whether llama.cpp has put rows of queries and keys into pairs, as it rotates them."""
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names -> those of the graph."""
COMPUTED = ("rope_freqs", "rope_factors_long", "rope_factors_short")
"""Tensors that follow from config.json."""


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file that a folder's model is stored in; None if it is not: safetensors go before it.

    Raises:
        ModelError: there are several.
    """
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(
            f"{folder} has {len(files)} GGUF files, such as {files[0].name} and {files[1].name}: leave the one to "
            "train on; one in several parts is joined by llama.cpp's gguf-split --merge"
        )
    return files[0] if files else None


def from_pretrained_arguments(folder: Path, better: str) -> dict[str, Any]:
    """What transformers' from_pretrained has to be told to read a folder that may be one of GGUF.

    Args:
        folder: the model's.
        better: a file which says more exactly what the GGUF file says, and is read instead where there is one.
    """
    file = None if (folder / better).is_file() else gguf_file(folder)
    return {} if file is None else {"gguf_file": file.name}


def refusal(folder: Path) -> str | None:
    """Why the folder's GGUF file cannot be trained on exactly, to be read after the folder's name; None: it can, or
    there is none. Raises ModelError as gguf_file, and where the file cannot be read."""
    file = gguf_file(folder)
    if file is None:
        return None
    architecture = _metadata(file, "general.architecture")
    if architecture not in ARCHITECTURES:
        return f"has a GGUF file of a {architecture!r} model; supported are {', '.join(ARCHITECTURES)}"
    scaled = _metadata(file, f"{architecture}.rope.scaling.type") not in (None, "none")
    scaled |= any(tensor.name.removesuffix(".weight") in COMPUTED for tensor in _reader(file).tensors)
    if scaled and not (folder / "config.json").is_file():
        return (
            "has a GGUF file with scaled rotary embeddings, of which it does not tell enough; put the config.json of "
            "the model that it was made of beside it"
        )
    return None


def description(file: Path) -> str:
    """For people: the types of its matrices, the most frequent first."""
    sizes: dict[str, int] = {}
    for tensor in _reader(file).tensors:
        if len(tensor.shape) == 2:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return f"GGUF, {', '.join(sorted(sizes, key=lambda kind: -sizes[kind]))}"


def embedding_bytes(file: Path) -> int:
    """Bytes of one number of the embedding, once it is loaded."""
    kinds = [
        tensor.tensor_type.name for tensor in _reader(file).tensors if tensor.name == "token_embd.weight"
    ]
    return max((PLAIN.get(kind, torch.float32).itemsize for kind in kinds), default=4)


def stored_tensors(file: Path) -> Iterator[Any]:
    """gguf's ReaderTensor of every tensor that a graph has a place for; their data are mapped. Raises ModelError."""
    for tensor in _reader(file).tensors:
        if tensor.name.removesuffix(".weight") not in COMPUTED:
            yield tensor


def graph_name(name: str) -> str:
    """llama.cpp's name of a tensor -> the graph's; unchanged where it is none that is known."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def stored_bytes(tensor: Any) -> Tensor:
    """The tensor's bytes, mapped: uint8 (n,)."""
    return torch.from_numpy(tensor.data.reshape(-1).view(np.uint8))


def weight_of(tensor: Any, file: Path, heads: int, kv_heads: int) -> Tensor:
    """The tensor as the graph has it, in its own type if that is plain, else in float32."""
    kind = tensor.tensor_type.name
    shape = tuple(int(size) for size in reversed(tensor.shape))
    plain = PLAIN.get(kind)
    weight = stored_bytes(tensor).view(plain).view(shape) if plain else _dequantize(tensor, shape)
    if ARCHITECTURES[_metadata(file, "general.architecture")]:
        of_queries = ".attn_q." in tensor.name
        if of_queries or ".attn_k." in tensor.name:
            return _halves_from_pairs(weight, heads if of_queries else kv_heads)
    return weight


def _halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """(rows, ...) -> the same, where the second of each pair of a head's rows follows all the firsts."""
    pairs = weight.view(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _dequantize(tensor: Any, shape: tuple[int, ...]) -> Tensor:
    from gguf import dequantize

    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    out = np.empty((len(rows), shape[-1]), dtype=np.float32)
    step = max(1, AT_ONCE // shape[-1])
    for first in range(0, len(rows), step):
        try:
            out[first : first + step] = dequantize(rows[first : first + step], tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"{tensor.name} is of GGUF's type {tensor.tensor_type.name}, which is not read"
            ) from error
    return torch.from_numpy(out).view(shape)


@cache
def _reader(file: Path) -> Any:
    """gguf.GGUFReader of a file, whose tensors are mapped. Raises ModelError."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"{file} can be read with the package gguf, which is not installed here; install qlora-operator[gguf], or "
            "give the model as safetensors"
        ) from error

    class Reader(GGUFReader):  # type: ignore[misc]
        """Goes by what its header says: an array of 2^60 strings, all behind the end, would never be read."""

        def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends before what its header says")
            return super()._get(offset, dtype, count, **order)

    try:
        return Reader(file, "c")  # copy on write: torch warns of arrays that cannot be written to
    except Exception as error:  # numpy's own, of whatever is where a header should be
        raise ModelError(f"{file} is not a complete GGUF file: {first_line(error)}") from error


def _metadata(file: Path, key: str) -> Any:
    """A value of the file's metadata; None where it has none."""
    field = _reader(file).get_field(key)
    return None if field is None else field.contents()
