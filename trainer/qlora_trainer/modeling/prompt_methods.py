"""Prompt tuning (Lester et al. 2021) and prefix tuning (Li and Liang 2021; P-tuning v2, Liu et al. 2022).

The frozen model gets trained virtual tokens before each sample: as rows beside the embeddings, or as keys and values of
every layer. Parameters, their shapes and how they start are PEFT's; so is the file of the finished adapter, one matrix
`prompt_embeddings` with a row for each virtual token.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qlora_contract.run_config import Adapter
from qlora_trainer.data.collate import Batch, pad_multiple
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.adapter_parameters import AdapterParameters, Encode, flat_parameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.key_value_cache import CachedSequence
from qlora_trainer.modeling.lora_linear import Dropout, seeded_generator
from qlora_trainer.modeling.virtual_tokens import PrefixTokens, SoftPrompt

EMBEDDING = "prompt_encoder.embedding.weight"
"""(virtual tokens, numbers of each)."""
IN, OUT = "prompt_encoder.transform.0", "prompt_encoder.transform.2"
"""The two linear layers of the MLP that makes a prefix, with a tanh between them."""
PUBLISHED = "prompt_embeddings"
"""The one tensor of the finished adapter."""


class Matrix:
    """The finished adapter's matrix: made from the parameters, until one is loaded in its place.

    Args:
        maker: makes it.
        sizes: those of the model that PEFT's adapter_config.json has.
    """

    def __init__(self, maker: Callable[[], Tensor], sizes: Mapping[str, int]) -> None:
        self._maker = maker
        self.sizes = sizes
        self._loaded: Tensor | None = None

    def __call__(self) -> Tensor:
        """(virtual tokens, numbers of each), fp32."""
        return self._maker() if self._loaded is None else self._loaded

    def tensors(self) -> dict[str, Tensor]:
        """It, by PEFT's name."""
        with torch.no_grad():
            return {PUBLISHED: self().detach().contiguous()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this one."""
        self._loaded = tensors[PUBLISHED].float().clone()

    def make(self) -> None:
        """Make it again."""
        self._loaded = None


@dataclass(frozen=True)
class PromptTuning:
    """The AdapterMethod `prompt-tuning`: virtual tokens beside the embeddings."""

    adapter: Adapter
    """The job's settings."""

    def attach(
        self,
        model: BaseModel,
        *,
        seed: int,
        dropout: Dropout | None,  # noqa: ARG002 - AdapterMethod's
        encode: Encode | None = None,
    ) -> AdapterParameters:
        """Put rows before each sample: normal with deviation 1, as in PEFT; or the embeddings of promptInitText.

        Raises:
            ModelError: the text has no tokens.
        """
        graph: Any = model.graph
        parameters = flat_parameters(self.parameter_shapes({}, graph.config))
        embedding = parameters.named[EMBEDDING]
        generator = seeded_generator(f"prompt-tuning/{seed}/{EMBEDDING}")
        with torch.no_grad():
            embedding.normal_(generator=generator)
            if self.adapter.prompt_init == "text" and encode is not None:
                embedding.copy_(graph.get_input_embeddings()(_text_ids(self.adapter, encode)))
        config = graph.config
        matrix = Matrix(
            lambda: embedding,
            {
                "token_dim": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_layers": config.num_hidden_layers,
            },
        )
        model.virtual = SoftPrompt(len(embedding), embedding=matrix)
        parameters.form = matrix
        return parameters

    def parameter_shapes(
        self,
        linears: Mapping[str, tuple[int, ...]],  # noqa: ARG002 - AdapterMethod's
        config: Any,
    ) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what is trained."""
        return {EMBEDDING: (self.adapter.virtual_tokens, config.hidden_size)}

    def parameter_count(self, linears: Mapping[str, tuple[int, ...]], config: Any) -> int:
        """Numbers that are trained."""
        return count_of(self.parameter_shapes(linears, config))

    def peft_config(self, parameters: AdapterParameters) -> dict[str, Any]:
        """Prompt tuning's part of adapter_config.json. What the prompt started as is of no use to who loads it."""
        assert isinstance(parameters.form, Matrix)
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.adapter.virtual_tokens,
            "num_transformer_submodules": 1,
            **parameters.form.sizes,
        }


@dataclass(frozen=True)
class PrefixTuning:
    """The AdapterMethod `prefix-tuning`: virtual tokens that are keys and values of every layer.

    They are parameters, or with prefixProjection what an MLP makes of an embedding: W2 tanh(W1 e + b1) + b2.
    """

    adapter: Adapter
    """The job's settings."""

    def attach(
        self,
        model: BaseModel,
        *,
        seed: int,
        dropout: Dropout | None,  # noqa: ARG002 - AdapterMethod's
        encode: Encode | None = None,
    ) -> AdapterParameters:
        """Put keys and values before each sample.

        They start as in PEFT: the embedding normal with deviation 1, the MLP's layers uniform in +-1/sqrt(in); or as
        the keys and values of promptInitText (Li and Liang 2021).

        Raises:
            ModelError: the text has no tokens.
        """
        config: Any = model.graph.config
        parameters = flat_parameters(self.parameter_shapes({}, config))
        for name, parameter in parameters.named.items():
            generator = seeded_generator(f"prefix-tuning/{seed}/{name}")
            with torch.no_grad():
                if name == EMBEDDING:
                    parameter.normal_(generator=generator)
                else:
                    layer = parameters.named[f"{name.rpartition('.')[0]}.weight"]
                    bound = 1.0 / math.sqrt(layer.shape[1])
                    parameter.uniform_(-bound, bound, generator=generator)
        if self.adapter.prompt_init == "text" and encode is not None:
            ids = _text_ids(self.adapter, encode)
            parameters.named[EMBEDDING].data.copy_(keys_and_values(model, ids))
        width = key_width(config)
        matrix = Matrix(
            _maker(parameters.named),
            {  # as PEFT has them: of keys, which are fewer than queries in many models
                "token_dim": width,
                "num_attention_heads": config.num_key_value_heads,
                "num_layers": config.num_hidden_layers,
                "encoder_hidden_size": self.adapter.encoder_hidden_size or width,
            },
        )
        model.virtual = PrefixTokens(
            self.adapter.virtual_tokens,
            layers=config.num_hidden_layers,
            key_heads=config.num_key_value_heads,
            make=matrix,
        )
        parameters.form = matrix
        return parameters

    def parameter_shapes(
        self,
        linears: Mapping[str, tuple[int, ...]],  # noqa: ARG002 - AdapterMethod's
        config: Any,
    ) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what is trained.

        Raises:
            ModelError: the model has layers without keys and values.
        """
        kinds = list(getattr(config, "layer_types", None) or ())
        if linear := kinds.count("linear_attention"):
            raise ModelError(
                f"adapter.method is prefix-tuning, but {linear} of the model's {len(kinds)} layers have linear "
                "attention, where there are no keys and values for a prefix to be: take lora or prompt-tuning"
            )
        width = key_width(config)
        numbers, tokens = 2 * config.num_hidden_layers * width, self.adapter.virtual_tokens
        if not self.adapter.prefix_projection:
            return {EMBEDDING: (tokens, numbers)}
        hidden = self.adapter.encoder_hidden_size or width
        return {
            EMBEDDING: (tokens, width),
            f"{IN}.weight": (hidden, width),
            f"{IN}.bias": (hidden,),
            f"{OUT}.weight": (numbers, hidden),
            f"{OUT}.bias": (numbers,),
        }

    def parameter_count(self, linears: Mapping[str, tuple[int, ...]], config: Any) -> int:
        """Numbers that are trained."""
        return count_of(self.parameter_shapes(linears, config))

    def peft_config(self, parameters: AdapterParameters) -> dict[str, Any]:
        """Prefix tuning's part of adapter_config.json."""
        assert isinstance(parameters.form, Matrix)
        return {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.adapter.virtual_tokens,
            "num_transformer_submodules": 1,
            "prefix_projection": self.adapter.prefix_projection,
            **parameters.form.sizes,
        }


def _text_ids(adapter: Adapter, encode: Encode) -> Tensor:
    """The text's tokens, repeated or cut off to the number of virtual tokens. Raises ModelError."""
    assert adapter.prompt_init_text is not None
    ids = encode(adapter.prompt_init_text)
    if not ids:
        raise ModelError("adapter.promptInitText has no tokens: write what the model is to do")
    return torch.tensor(ids)[torch.arange(adapter.virtual_tokens) % len(ids)]


@torch.no_grad()
def keys_and_values(model: BaseModel, ids: Tensor) -> Tensor:
    """What the base's layers keep of these tokens: (tokens, 2 * layers * width of keys), fp32.

    A sample behind them is then read as if it stood behind the text.
    """
    count, padding = len(ids), -len(ids) % pad_multiple(model.dtype)
    sequence = CachedSequence(count)
    batch = Batch(
        torch.cat([ids, ids.new_zeros(padding)]),
        torch.cat([torch.arange(count), torch.arange(padding)]),
        [count, padding] if padding else [count],
        padding,
        logit_positions=torch.empty(0, dtype=torch.int64),
        targets=torch.empty(0, dtype=torch.int64),
    )
    was_training = model.graph.training
    model.graph.eval()
    model.hidden_states(batch, [sequence, None][: len(batch.lengths)])
    model.graph.train(was_training)
    graph: Any = model.graph
    kept = [each[0] for layer in range(graph.config.num_hidden_layers) for each in sequence.of_layer(layer)]
    return torch.stack(kept).permute(2, 0, 1, 3).reshape(count, -1).float()


def _maker(named: Mapping[str, nn.Parameter]) -> Callable[[], Tensor]:
    """What gives (virtual tokens, 2 * layers * width of keys)."""
    if f"{IN}.weight" not in named:
        return lambda: named[EMBEDDING]

    def project() -> Tensor:
        inner = F.linear(named[EMBEDDING], named[f"{IN}.weight"], named[f"{IN}.bias"])
        return F.linear(inner.tanh(), named[f"{OUT}.weight"], named[f"{OUT}.bias"])

    return project


def key_width(config: Any) -> int:
    """Numbers of a token's keys in a layer, over all of its key heads."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size * config.num_key_value_heads)


def count_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(map(math.prod, shapes.values()))


def made_weights(adapter: Adapter, config: Any) -> int:
    """Numbers that an adapter makes of its parameters anew in each pass: the keys and values of a prefix."""
    if adapter.method != "prefix-tuning":
        return 0
    return adapter.virtual_tokens * 2 * int(config.num_hidden_layers) * key_width(config)
