"""The base model: transformers' graph, our linears, weights streamed from safetensors.

The graph is built without memory (on the meta device), then each tensor is
read from its file, quantised if it belongs to a linear layer, and put in its
place, one at a time: a whole model in full precision never exists.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_trainer import attention
from qlora_trainer.adapter import LoraLinear
from qlora_trainer.batch import Batch
from qlora_trainer.errors import ModelError
from qlora_trainer.layers import slim
from qlora_trainer.loss import summed_cross_entropy
from qlora_trainer.quantise import Nf4Weight, QuantisationError, quantise_nf4

ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Values of config.json's model_type whose graph is known to pass segments through to attention."""
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that change with a row's length: a packed row would turn its samples differently."""

Scheme = Literal["nf4", "nf4-double", "none", "as-stored"]
"""How linear weights are kept: NF4 with fp32 or double-quantised scales; in the compute dtype; or as the file has
them, mapped and not copied (for one pass over the unquantised base)."""


class Embedding(nn.Module):
    """The frozen token embedding, kept in the checkpoint's dtype, given out in the compute dtype."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., hidden size)."""
        return F.embedding(ids, self.weight).to(self.dtype)


@dataclass
class BaseModel:
    """A causal language model with frozen weights."""

    graph: nn.Module
    """transformers' decoder without its output head."""
    head: Tensor
    """(vocabulary, hidden size), in the checkpoint's dtype; the embedding itself where they are tied."""
    linears: dict[str, LoraLinear]
    """Every linear layer but the head, by its path in the checkpoint (`model.layers.0.mlp.up_proj`)."""
    dtype: torch.dtype
    """What is computed in."""

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over the batch's supervised tokens, fp64."""
        hidden = self.graph(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            segment_lengths=batch.lengths,
        ).last_hidden_state[0]
        return summed_cross_entropy(hidden[batch.rows], self.head, batch.targets)

    def checkpoint_layers(self) -> None:
        """Recompute each layer in the backward pass instead of keeping what it needs."""
        graph: Any = self.graph
        graph.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def read_config(folder: Path) -> Any:
    """config.json of a model folder, refused where this trainer cannot be exact."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: model.source must be a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{folder}/config.json cannot be read: {_first_line(error)}") from error
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"{folder} is a {config.model_type!r} model; those supported: {known}")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{folder} is quantised already; give the unquantised model, it is quantised on load"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in LENGTH_DEPENDENT_ROPE:
        raise ModelError(f"{folder} uses {rope!r} rotary embeddings, which packing cannot keep exact")
    return config


def load_model(folder: Path, scheme: Scheme, dtype: torch.dtype) -> BaseModel:
    """Stream a model from its safetensors files.

    Args:
        folder: with config.json and model.safetensors, or shards and their index.
        scheme: how linear weights are kept.
        dtype: what is computed in.

    Raises:
        ModelError: for missing, misshapen, unknown or non-finite tensors, by name.
    """
    attention.register()
    config = read_config(folder)
    with torch.device("meta"):
        graph = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=dtype)
    builder = _Builder(graph, scheme, dtype)
    for name, tensor in _tensors(folder):
        builder.put(name, tensor)
    return builder.finish(folder)


class _Builder:
    """Puts tensors where they belong and knows what is still missing."""

    def __init__(self, graph: nn.Module, scheme: Scheme, dtype: torch.dtype) -> None:
        self.graph, self.scheme, self.dtype = graph, scheme, dtype
        self.missing = {name: tuple(p.shape) for name, p in graph.named_parameters(remove_duplicate=True)}
        self.head_name = "lm_head.weight"
        self.tied = bool(getattr(graph.config, "tie_word_embeddings", False))
        if self.tied:
            self.missing.pop(self.head_name, None)
        self.linears: dict[str, LoraLinear] = {}
        self.head: Tensor | None = None
        self.tied_copy: Tensor | None = None

    def put(self, name: str, tensor: Tensor) -> None:
        """Take one tensor of the checkpoint."""
        if name not in self.missing and f"model.{name}" in self.missing:
            name = f"model.{name}"  # saved from the decoder alone
        if name.endswith("rotary_emb.inv_freq"):
            return  # old checkpoints hold it; it is computed
        if name == self.head_name and self.tied:
            self.tied_copy = tensor
            return
        if name not in self.missing:
            raise ModelError(f"{name} is in the checkpoint twice, or is no part of the model in config.json")
        expected = self.missing.pop(name)
        if not tensor.is_floating_point():
            raise ModelError(
                f"{name} holds {tensor.dtype}; only unquantised weights, which are floats, are read"
            )
        if tuple(tensor.shape) != expected:
            raise ModelError(f"{name} has shape {tuple(tensor.shape)}; config.json asks for {expected}")
        path, _, leaf = name.rpartition(".")
        module = self.graph.get_submodule(path)
        if name == self.head_name:
            self.head = _finite(name, tensor).clone()
        elif isinstance(module, nn.Embedding):
            self._put_embedding(path, _finite(name, tensor).clone())
        elif isinstance(module, nn.Linear | LoraLinear):
            self._put_linear(path, leaf, name, tensor)
        else:
            value = _finite(name, tensor).to(self.dtype, copy=True)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def _put_embedding(self, path: str, weight: Tensor) -> None:
        self.graph.set_submodule(path, Embedding(weight, self.dtype))
        if self.tied:
            self.head = weight

    def _put_linear(self, path: str, leaf: str, name: str, tensor: Tensor) -> None:
        """A linear's weight or bias, whichever comes first, replaces transformers' layer by ours."""
        if path not in self.linears:
            layer = LoraLinear(path, torch.empty(0), None)
            self.linears[path] = layer
            self.graph.set_submodule(path, layer)
        layer = self.linears[path]
        if leaf == "bias":
            layer.bias = _finite(name, tensor).to(self.dtype, copy=True)
        else:
            layer.weight = self._frozen(name, tensor)

    def _frozen(self, name: str, tensor: Tensor) -> Nf4Weight | Tensor:
        if self.scheme == "as-stored":
            return tensor
        if self.scheme == "none":
            return _finite(name, tensor).to(self.dtype, copy=True)
        try:
            return quantise_nf4(tensor, double=self.scheme == "nf4-double", name=name)
        except QuantisationError as error:
            raise ModelError(str(error)) from error

    def finish(self, folder: Path) -> BaseModel:
        """The finished model, once nothing is missing."""
        if self.missing or self.head is None:
            names = ", ".join(sorted(self.missing)[:3]) or self.head_name
            raise ModelError(f"{folder} lacks {len(self.missing) or 1} tensors, such as {names}")
        if self.tied_copy is not None and not torch.equal(self.tied_copy, self.head):
            raise ModelError(
                f"{self.head_name} differs from the embedding, to which config.json ties it (tie_word_embeddings)"
            )
        decoder: Any = self.graph.get_submodule("model")
        # Its buffers are computed, not loaded.
        decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)
        slim(decoder, decoder.config.hidden_act)
        order = {name: self.linears[name] for name, _ in self.graph.named_modules() if name in self.linears}
        return BaseModel(decoder, self.head, order, self.dtype)


def target_layers(linears: dict[str, LoraLinear], targets: list[str]) -> dict[str, LoraLinear]:
    """The linear layers that `targets` name, by last part or whole path; `all-linear` names all.

    Raises:
        ModelError: for a target that names none, with those that exist.
    """
    if "all-linear" in targets:
        return linears
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    for target in targets:
        if not any(_matches(name, target) for name in linears):
            raise ModelError(
                f"adapter.targetModules: no linear layer is called {target!r}; "
                f"this model has: {', '.join(kinds)} (or all-linear)"
            )
    return {n: layer for n, layer in linears.items() if any(_matches(n, t) for t in targets)}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise ModelError(
                f"{folder} has neither model.safetensors nor {index.name}; only safetensors is read"
            )
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of safetensors files: {_first_line(error)}") from error
    missing = [n for n in map(str, names) if "/" in n or not (folder / n).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return [folder / n for n in names]


def fingerprint(folder: Path) -> str:
    """sha256 over config.json and each weight file's size and header: tells models apart without reading them whole."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(length, 100_000_000))
        digest.update(f"{file.name} {file.stat().st_size}".encode() + header)
    return digest.hexdigest()


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file; ModelError when it is not whole."""
    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ModelError(f"{file} is not a whole safetensors file: {_first_line(error)}") from error


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, mapped from its file."""
    for file in weight_files(folder):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


def _finite(name: str, tensor: Tensor) -> Tensor:
    low, high = torch.aminmax(tensor)  # NaN if any is; isfinite(tensor) would make copies of it
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ModelError(f"{name} holds NaN or infinite numbers")
    return tensor


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
