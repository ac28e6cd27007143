"""Loading the base model: transformers' graph, our layers, weights streamed from their files.

The graph is built without memory (on the meta device), then each weight is
read from its file, dequantized if it is stored so, quantized if it belongs to a linear layer, and put in its
place, one at a time: a whole model in full precision never exists.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.errors import ModelError
from qlora_trainer.modeling import delta_net
from qlora_trainer.modeling.base_model import BaseModel, Embedding
from qlora_trainer.modeling.expert_adapters import ExpertMatrices, parameter_and_number
from qlora_trainer.modeling.families import Family, read_model
from qlora_trainer.modeling.graph import build_graph
from qlora_trainer.modeling.image import Image, ImageWriter, Kept, Table
from qlora_trainer.modeling.layers import fuse_layers
from qlora_trainer.modeling.lora_linear import LoraLinear
from qlora_trainer.modeling.rotary import rotary_embeddings
from qlora_trainer.modeling.stored.reading import StoredWeight, stored_weights
from qlora_trainer.modeling.weight_files import WeightsHash
from qlora_trainer.quantization.frozen_weight import FrozenWeight, UnreadWeight
from qlora_trainer.quantization.schemes import AsStored, Scheme, finite


def load_model(
    folder: Path,
    scheme: Scheme,
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda _: None,
    weights_hash: WeightsHash | None = None,
    stored: Iterable[tuple[str, Tensor]] | None = None,
) -> BaseModel:
    """Stream a model from its files.

    Args:
        folder: with config.json and model.safetensors, or shards and their index, or a GGUF file.
        scheme: how linear weights are kept: `scheme_of` a job's settings, or AsStored().
        dtype: what is computed in.
        advance: called with the number of bytes that were just loaded. What it raises ends the load.
        weights_hash: gets every tensor as it is stored.
        stored: name and value of each tensor, where they come from elsewhere than the folder's files.

    Raises:
        ModelError: for a model that is refused; for missing, misshapen, unknown or non-finite tensors, by name.
    """
    family, config = read_model(folder)
    graph = build_graph(config, family, dtype)
    builder = _Builder(graph, family, dtype, copies=True)
    weights = stored_weights(folder, config, _joined(family)) if stored is None else map(_as_stored, stored)
    for name, value in _kept(folder, graph, family, scheme, dtype, weights, advance, weights_hash):
        builder.place(name, value)
    return builder.finish()


def write_image(
    folder: Path,
    scheme: Scheme,
    dtype: torch.dtype,
    into: Path,
    advance: Callable[[int], None] = lambda _: None,
    weights_hash: WeightsHash | None = None,
) -> Table:
    """Write a model's image (modeling.image) into a folder, a weight at a time; its table.

    Args:
        folder: of the model, as load_model has it.
        scheme: how linear weights are kept.
        dtype: what is computed in, for a scheme that does not quantize.
        into: the folder.
        advance, weights_hash: as load_model has them.

    Raises:
        ModelError: as load_model.
        OSError: it cannot be written.
    """
    family, config = read_model(folder)
    graph = build_graph(config, family, dtype)
    with ImageWriter(into) as image:
        weights = stored_weights(folder, config, _joined(family))
        for name, value in _kept(folder, graph, family, scheme, dtype, weights, advance, weights_hash):
            image.add(name, value)
        return image.table


def load_image(folder: Path, image: Image, dtype: torch.dtype) -> BaseModel:
    """The model of an image, which it maps: to the bit what load_model makes.

    Args:
        folder: of the model that the image was made of.
        image: of this model.
        dtype: what is computed in.
    """
    family, config = read_model(folder)
    builder = _Builder(build_graph(config, family, dtype), family, dtype, copies=False)
    for name, value in image.weights():
        builder.place(name, value)
    return builder.finish()


def _joined(family: Family) -> tuple[str, ...]:
    return () if family.experts is None else family.experts.joined


def _as_stored(named: tuple[str, Tensor]) -> StoredWeight:
    name, tensor = named
    return StoredWeight(name, {name: tensor}, lambda: tensor)


def _kept(
    folder: Path,
    graph: nn.Module,
    family: Family,
    scheme: Scheme,
    dtype: torch.dtype,
    weights: Iterable[StoredWeight],
    advance: Callable[[int], None],
    weights_hash: WeightsHash | None,
) -> Iterator[tuple[str, Kept]]:
    """What of a checkpoint the graph has a place for, by name in the graph. Raises ModelError as load_model."""
    sieve = _Sieve(graph, family, scheme, dtype)
    for weight in weights:
        if weights_hash is not None:
            for name, tensor in weight.stored.items():
                weights_hash.add(name, tensor)
        if (found := sieve.take(weight)) is not None:
            yield found
        advance(weight.nbytes)
    sieve.check(folder)


class _Sieve:
    """Takes the tensors of a checkpoint in any order and keeps track of those still missing."""

    def __init__(self, graph: nn.Module, family: Family, scheme: Scheme, dtype: torch.dtype) -> None:
        self.graph, self.family, self.scheme, self.dtype = graph, family, scheme, dtype
        self.missing = {name: tuple(p.shape) for name, p in graph.named_parameters(remove_duplicate=True)}
        self.head_name = f"{family.head}.weight"
        self.tied = _is_tied(graph)
        if self.tied:
            self.missing.pop(self.head_name, None)
        self.embedding: Tensor | None = None
        self.tied_copy: Tensor | None = None

    def take(self, stored: StoredWeight) -> tuple[str, Kept] | None:
        """Name in the graph and value of a weight, still mapped from its file unless it is quantized; None: not needed.

        Raises:
            ModelError: it is not one of those still missing, of another shape, not of floats, or not finite.
        """
        name = self.family.name_in_graph(stored.name)
        if name is None:
            return None
        tensor = stored.read()
        if name not in self.missing and f"{self.family.decoder}.{name}" in self.missing:
            name = f"{self.family.decoder}.{name}"  # saved from the decoder alone
        if name.endswith("rotary_emb.inv_freq"):
            return None  # old checkpoints hold it; it is computed
        if name == self.head_name and self.tied:
            self.tied_copy = tensor
            return None
        self._check(name, tensor)
        path, _, leaf = name.rpartition(".")
        module = self.graph.get_submodule(path)
        if isinstance(module, nn.Linear) and leaf == "weight" and name != self.head_name:
            return name, self._frozen(stored, name, tensor)
        if isinstance(module, nn.Embedding):
            self.embedding = tensor
        return name, finite(name, tensor)

    def _frozen(self, stored: StoredWeight, name: str, tensor: Tensor) -> FrozenWeight:
        """A linear layer's weight (out, in), as the scheme keeps it."""
        if stored.dequantized and isinstance(self.scheme, AsStored):
            out, in_ = tensor.shape
            return UnreadWeight(stored.read, (out, in_), stored.nbytes)
        return self.scheme.freeze(name, tensor, self.dtype)

    def _check(self, name: str, tensor: Tensor) -> None:
        """Cross a tensor off the missing ones. Raises ModelError."""
        if name not in self.missing:
            raise ModelError(
                f"{name} is in the checkpoint twice, or does not belong to the model that config.json describes"
            )
        expected = self.missing.pop(name)
        if not tensor.is_floating_point():
            raise ModelError(f"{name} holds {tensor.dtype}; only floating-point weights can be read")
        if tuple(tensor.shape) != expected:
            raise ModelError(f"{name} has shape {tuple(tensor.shape)}; config.json says {expected}")

    def check(self, folder: Path) -> None:
        """Raise ModelError while something is missing, or the head is not what it is tied to."""
        if self.missing:
            names = ", ".join(sorted(self.missing)[:3])
            raise ModelError(f"{folder} lacks {len(self.missing)} of the model's tensors, such as {names}")
        if (
            self.tied_copy is not None
            and self.embedding is not None
            and not torch.equal(self.tied_copy, self.embedding)
        ):
            raise ModelError(
                f"{self.head_name} differs from the embedding, to which config.json ties it (tie_word_embeddings)"
            )


class _Builder:
    """Puts weights into their places in the graph.

    `copies`: whether what is kept in its stored dtype is copied, since it is mapped from the checkpoint's files.
    """

    def __init__(self, graph: nn.Module, family: Family, dtype: torch.dtype, *, copies: bool) -> None:
        self.graph, self.family, self.dtype, self.copies = graph, family, dtype, copies
        self.head: Tensor | None = None
        self.weights: dict[str, FrozenWeight] = {}
        self.biases: dict[str, Tensor] = {}

    def place(self, name: str, value: Kept) -> None:
        """Put a weight in its place."""
        path, _, leaf = name.rpartition(".")
        module = self.graph.get_submodule(path)
        if not isinstance(value, Tensor):
            self.weights[path] = value
        elif name == f"{self.family.head}.weight":
            self.head = self._own(value)
        elif isinstance(module, nn.Embedding):
            weight = self._own(value)
            factor = getattr(module, "scalar_embed_scale", 1.0)
            self.graph.set_submodule(path, Embedding(weight, self.dtype, factor))
            if _is_tied(self.graph):
                self.head = weight
        elif isinstance(module, nn.Linear):
            self.biases[path] = value.to(self.dtype, copy=True)
        else:
            dtype = torch.float32 if leaf in delta_net.FP32 else self.dtype
            setattr(module, leaf, nn.Parameter(value.to(dtype, copy=True), requires_grad=False))

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if self.copies else tensor

    def finish(self) -> BaseModel:
        """The finished model, once everything is in its place."""
        assert self.head is not None
        in_order = [path for path, _ in self.graph.named_modules() if path in self.weights]
        linears: dict[str, LoraLinear] = {}
        experts: dict[str, ExpertMatrices] = {}
        for path in in_order:
            name = self.family.public_name(path)
            layer = LoraLinear(name, self.weights[path], self.biases.get(path))
            self.graph.set_submodule(path, layer)
            if self.family.adapts(path):
                linears[name] = layer
            elif found := parameter_and_number(name):
                of_all = experts.setdefault(found[0], ExpertMatrices()).experts
                if found[1] == len(of_all):
                    of_all.append([])
                of_all[found[1]].append(layer)
        decoder: Any = self.graph.get_submodule(self.family.decoder)
        if decoder.rotary_emb is not None:  # its buffers are computed, not loaded
            decoder.rotary_emb = rotary_embeddings(type(decoder.rotary_emb), decoder.config)
        fuse_layers(decoder, self.family)
        return BaseModel(
            decoder,
            self.head,
            linears,
            self.dtype,
            experts,
            logits_divisor=self._setting(self.family.logits_divisor) or 1.0,
            softcap=self._setting(self.family.softcap),
        )

    def _setting(self, name: str | None) -> float | None:
        """A number of config.json, None where the family has none."""
        return None if name is None else getattr(self.graph.config, name, None)


def _is_tied(graph: nn.Module) -> bool:
    """Whether the output head is the embedding."""
    return bool(getattr(graph.config, "tie_word_embeddings", False))
