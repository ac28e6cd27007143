"""Proof that what was exported is the adapter's model: it is opened again, and its logits are compared.

On a few texts, in fp32, the logits of the base, of the base with the adapter, and of the export, which is read back
from its files. A weight is mapped from its file, or dequantized for the one product it takes part in: the comparison
needs little more memory than the embedding.

    d = adapted - base,  e = export - base  (each row centered, as softmax has it)
    share = <d, e> / <d, d>

The share of the adapter's effect that is in the export is about 1, whatever noise quantization adds, since noise points
elsewhere. It is 0 for an export without the adapter.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from qlora_contract.export import ExportForm
from qlora_trainer.data.collate import Batch
from qlora_trainer.errors import ModelError
from qlora_trainer.export.adapter_weights import AdapterWeights, LayerAdapter
from qlora_trainer.export.gguf_names import GgufNames
from qlora_trainer.export.merged_weights import StoredTensor
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.loss import cap
from qlora_trainer.modeling.weight_files import WeightsHash
from qlora_trainer.quantization.frozen_weight import FrozenWeight, UnquantizedWeight, check_out
from qlora_trainer.quantization.schemes import AsStored

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    'def add(a, b):\n    """Return the sum of two numbers."""\n    return a + b\n',
    "Question: what is 17 times 3?\nAnswer: 17 times 3 is 51.",
    "Once upon a time there was a small village by the sea, where everybody knew everybody else.",
    '{"name": "Ada", "age": 36, "languages": ["English", "French"]}',
)
TOKENS_OF_A_TEXT = 48
ROWS_OF_THE_HEAD = 8192
"""Logits are made of so many words at once."""


@dataclass(frozen=True)
class Comparison:
    """How far an export is the adapter's model, over all tokens of the texts."""

    tokens: int
    kl_divergence: float
    """Mean Kullback-Leibler divergence in nats of the next token's distribution from the adapter's."""
    greedy_agreement: float
    """Share of tokens after which both would choose the same one."""
    adapter_share: float
    """How much of the adapter's effect is there."""
    rounding: float
    """How far the export's logits are from the adapter's model's, over how far those are from the base's."""
    base_kl_divergence: float
    """The divergence of the base without the adapter, to hold the first against."""

    def report(self) -> dict[str, Any]:
        """For export_report.json."""
        return dataclasses.asdict(self)


LARGEST_DIVERGENCE: Mapping[ExportForm, float] = {
    "merged": 0.02,
    "gguf-f16": 0.02,
    "gguf-q8_0": 0.1,
    "gguf-q4_k_m": 1.0,
    "gguf-lora": 1e-3,
}
"""Beyond this an export is broken. Its type's own rounding is far below."""
SMALLEST_SHARE = 0.5
HIDING_ROUNDING = 1.5
"""Above 1, which is the distance of an export without the adapter."""


def check(form: ExportForm, found: Comparison) -> None:
    """Raise ModelError for an export that is not the adapter's model."""
    share = round(found.adapter_share, 2) + 0.0  # not -0
    # What the type's rounding adds is larger than the effect of a weak adapter, and hides it: that proves nothing.
    hidden = found.rounding > HIDING_ROUNDING
    if not hidden and not abs(share - 1) <= 1 - SMALLEST_SHARE:
        raise ModelError(
            f"the export {form} was opened again, and {share:.0%} of the adapter's effect is in it: it "
            "would be served as if it had not been trained; nothing is kept of it"
        )
    if not found.kl_divergence <= LARGEST_DIVERGENCE[form]:
        raise ModelError(
            f"the export {form} was opened again, and diverges from the trained model by {found.kl_divergence:.3g} "
            f"nats, of which {LARGEST_DIVERGENCE[form]:g} would be its rounding; nothing is kept of it"
        )


class Proof:
    """The base and the adapter's model on the texts, to compare exports with.

    Args:
        folder: of the base model.
        adapter: the adapter.
        tokenizer: of transformers.
        weights_sha256: of the base that the adapter was trained on (WeightsHash); None where that is not known.

    Raises:
        ModelError: the base is another, the adapter changes nothing, or a logit is not finite.
    """

    def __init__(
        self, folder: Path, adapter: AdapterWeights, tokenizer: Any, weights_sha256: str | None = None
    ) -> None:
        self._folder = folder
        weights = None if weights_sha256 is None else WeightsHash(torch.get_num_threads())
        model = load_model(folder, AsStored(), torch.float32, weights_hash=weights)
        if (
            weights is not None
            and weights_sha256 is not None
            and (found := weights.hexdigest()) != weights_sha256
        ):
            raise ModelError(
                f"the weights of {folder} are not those that the adapter was trained on (sha256 {weights_sha256[:12]}, "
                f"here {found[:12]}): an adapter means nothing on another base; name the right one"
            )
        config: Any = model.graph.config
        self.batch = batch_of_texts(tokenizer, min(TOKENS_OF_A_TEXT, config.max_position_embeddings))
        self.base = logits(model, self.batch)
        attach(model, adapter.layers)
        self.adapted = logits(model, self.batch)
        if torch.equal(self.base, self.adapted):
            raise ModelError(
                "the adapter changes nothing: the model gives the same logits with and without it"
            )
        if not bool(torch.isfinite(self.adapted).all()):
            raise ModelError("the model with the adapter gives logits that are not finite")

    def of_folder(self, folder: Path) -> Comparison:
        """Compare a merged model."""
        return self._compare(load_model(folder, AsStored(), torch.float32))

    def of_gguf(self, file: Path, stored: Sequence[StoredTensor], config: Any) -> Comparison:
        """Compare a whole model's GGUF file.

        Args:
            file: the file.
            stored: the tensors that a model of this kind has.
            config: transformers' configuration of the model.
        """
        weights = GgufWeights(file, GgufNames(config))
        paths = {tensor.path: tensor.shape for tensor in stored if tensor.trained}
        return self._compare(load_model(self._folder, weights, torch.float32, stored=weights.tensors(paths)))

    def of_lora(self, file: Path, adapter: AdapterWeights, config: Any) -> Comparison:
        """Compare the base with an adapter's GGUF file. `adapter`: which layers it should change."""
        model = load_model(self._folder, AsStored(), torch.float32)
        attach(model, read_lora(file, list(adapter.layers), GgufNames(config)))
        return self._compare(model)

    def _compare(self, model: BaseModel) -> Comparison:
        return compare(self.base, self.adapted, logits(model, self.batch))


def compare(base: Tensor, adapted: Tensor, export: Tensor) -> Comparison:
    """Hold an export's logits against those of the base and of the adapter's model: (tokens, words) fp32 each."""
    effect, found = _centered(adapted - base), _centered(export - base)
    return Comparison(
        tokens=len(adapted),
        kl_divergence=_divergence(adapted, export),
        greedy_agreement=float((adapted.argmax(-1) == export.argmax(-1)).float().mean()),
        adapter_share=float(
            (effect * found).sum(dtype=torch.float64) / effect.square().sum(dtype=torch.float64)
        ),
        rounding=float((found - effect).norm() / effect.norm()),
        base_kl_divergence=_divergence(adapted, base),
    )


def _centered(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=-1, keepdim=True)


def _divergence(right: Tensor, other: Tensor) -> float:
    log_right = right.log_softmax(-1)
    return float((log_right.exp() * (log_right - other.log_softmax(-1))).sum(-1).mean())


def batch_of_texts(tokenizer: Any, longest: int) -> Batch:
    """TEXTS in one row, each cut off after so many tokens."""
    texts = [tokenizer(text)["input_ids"][:longest] for text in TEXTS]
    lengths = [len(text) for text in texts if text]
    ids = torch.tensor([id_ for text in texts for id_ in text], dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(ids, positions, lengths, 0, torch.arange(len(ids)), ids)


def logits(model: BaseModel, batch: Batch) -> Tensor:
    """(tokens, words) fp32."""
    model.graph.eval()
    with torch.no_grad():
        states = model.hidden_states(batch)
        parts = [states @ rows.float().t() for rows in torch.split(model.head, ROWS_OF_THE_HEAD)]
        found = torch.cat(parts, dim=-1)
        if model.softcap is not None:
            cap(found, model.softcap)
    return found


def attach(model: BaseModel, layers: Mapping[str, LayerAdapter]) -> None:
    """Give the layers their adapters. Raises ModelError for a layer that the model lacks."""
    for path, added in layers.items():
        if path not in model.linears:
            raise ModelError(f"the adapter changes {path}, which the model does not have")
        a, b = (nn.Parameter(matrix, requires_grad=False) for matrix in (added.a, added.b))
        model.linears[path].attach(a, b, added.scale, None)


# --- GGUF files


class GgufWeights:
    """A Scheme: linear weights that stay in a GGUF file, and are dequantized whenever they multiply.

    Args:
        file: a whole model's.
        names: what its tensors are called.
    """

    def __init__(self, file: Path, names: GgufNames) -> None:
        self._names = names
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}

    def tensors(self, paths: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
        """The file's tensors under transformers' names; matrices of layers without their numbers, see `freeze`.

        Args:
            paths: name -> shape of what a model of this kind may have.

        Raises:
            ModelError: the file holds a tensor that the model does not have.
        """
        unknown = set(self._tensors) - {"rope_freqs.weight"}
        for path, shape in paths.items():
            try:
                names = self._names.names(path)
            except ModelError:
                continue  # not in such files
            if any(name not in self._tensors for name in names):
                continue  # the head that is the embedding
            unknown.difference_update(names)
            is_layer = names[0].startswith("blk.") and self._tensors[names[0]].tensor_type != Type.F32
            yield path, torch.empty(shape, device="meta") if is_layer else self.value(path, shape)
        if unknown:
            raise ModelError(f"the GGUF file holds {min(unknown)}, which the model does not have")

    def freeze(self, name: str, _tensor: Tensor, _dtype: torch.dtype) -> FrozenWeight:
        """The weight of transformers' name."""
        return GgufWeight(self, name)

    def value(self, path: str, shape: Sequence[int] | None = None) -> Tensor:
        """A tensor under transformers' name, in its order, of `shape` where GGUF's is another: fp32."""
        expert = self._names.expert(path)
        parts = []
        for name in self._names.names(path):
            tensor = self._tensors[name]
            data = tensor.data if expert is None else tensor.data[expert]
            parts.append(torch.from_numpy(gguf.quants.dequantize(data, tensor.tensor_type).copy()).float())
        return self._names.from_gguf(path, parts, shape)

    def shape(self, path: str) -> tuple[int, int]:
        """(out, in) of a matrix."""
        tensors = [self._tensors[name] for name in self._names.names(path)]
        return sum(int(tensor.shape[1]) for tensor in tensors), int(tensors[0].shape[0])

    def nbytes(self, path: str) -> int:
        """Bytes in the file."""
        tensors = [self._tensors[name] for name in self._names.names(path)]
        experts = 1 if self._names.expert(path) is None else int(tensors[0].shape[2])
        return sum(int(tensor.n_bytes) for tensor in tensors) // experts


class GgufWeight:
    """A FrozenWeight of GgufWeights."""

    def __init__(self, weights: GgufWeights, path: str) -> None:
        self._weights, self._path = weights, path

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._weights.shape(self._path)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self._weights.nbytes(self._path)

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """(out, in)."""
        value = self._weights.value(self._path).to(dtype)
        if out is None:
            return value
        check_out(out, dtype, self.shape)
        return out.copy_(value)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, in) -> (rows, out)."""
        return UnquantizedWeight(self.dequantize(x.dtype)).linear(x, bias)

    def linear_grad_input(self, dy: Tensor) -> Tensor:
        """(rows, out) -> (rows, in)."""
        return dy @ self.dequantize(dy.dtype)


def read_lora(file: Path, layers: Sequence[str], names: GgufNames) -> dict[str, LayerAdapter]:
    """An adapter's GGUF file, read as llama.cpp does.

    Args:
        file: the file.
        layers: paths of the layers that it should change.
        names: what its tensors are called.

    Raises:
        ModelError: it lacks one of them, or holds others.
    """
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    found = {}
    for layer in layers:
        weight = f"{layer}.weight"
        wanted = names.names(weight)
        halves = {w: [tensors.pop(f"{each}.lora_{w}", None) for each in wanted] for w in "ab"}
        a, b = ([half for half in halves[w] if half is not None] for w in "ab")
        if len(a) < len(wanted) or len(b) < len(wanted):
            raise ModelError(f"{file.name} lacks {layer}")
        if any(not torch.equal(a[0], other) for other in a[1:]):
            raise ModelError(f"{file.name} takes {layer} apart into layers of different A")
        found[layer] = LayerAdapter(
            names.columns_from_gguf(weight, a[0]),
            names.rows_from_gguf(weight, torch.cat(b)),
            alpha / a[0].shape[0],
        )
    if tensors:
        raise ModelError(f"{file.name} holds {min(tensors)}, which no layer of the adapter is called")
    return found
