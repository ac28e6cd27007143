"""The numbers of a model that memory, time and the plan depend on, read from config.json alone."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_contract.memory import ModelShape
from qlora_contract.run_config import Adapter
from qlora_contract.units import first_line
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.delta_net import CHUNK, Heads
from qlora_trainer.modeling.expert_adapters import parameter_and_number, targeted
from qlora_trainer.modeling.families import EXPERTS, Family, read_model, rotary_parameters
from qlora_trainer.modeling.graph import build_graph
from qlora_trainer.modeling.prompt_methods import made_weights
from qlora_trainer.modeling.weight_files import bytes_per_weight


def model_shape(folder: Path, adapter: Adapter, *, weights: bool = True) -> ModelShape:
    """Measure the model in `folder`, and the adapter that it would get, without reading weights.

    Args:
        folder: the model's.
        adapter: the job's.
        weights: their files are there, and say how they are stored; else config.json does.

    Raises:
        ModelError: for a model or target modules that cannot be trained.
    """
    family, config = read_model(folder)
    # The graph is built in another type, and its configuration then says that.
    embedding_bytes = bytes_per_weight(folder) if weights else stored_bytes(config)
    graph = _graph(folder, family, config)
    everything = _linears(graph, family)
    linears = _adaptable(everything, family) | experts_of(everything, family)
    sizes = [prod(shape) for shape in everything.values()]
    on_experts = targeted(experts_of(everything, family), adapter.target_modules)[0]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = list(graph.get_submodule(f"{family.decoder}.layers").children())
    return ModelShape(
        hidden=config.hidden_size,
        intermediate=intermediate(config, family),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size,
        vocabulary=config.vocab_size,
        positions=positions(config),
        tied=bool(config.tie_word_embeddings),
        stored_bytes=embedding_bytes,
        linear_weights=sum(sizes),
        idle_weights=0 if family.experts is None else idle(everything, config),
        largest_linear=max(sizes),
        adapter_weights=method_for(adapter).parameter_count(linears, config),
        beside_layers=adapter.method == "lora",
        made_weights=made_weights(adapter, config),
        further_kept=_mean(
            further_kept(
                dict(layer.named_modules()),
                config.hidden_size,
                config.num_attention_heads * head_size,
                config.num_key_value_heads * head_size,
                beside=adapter.method == "lora",
            )
            for layer in layers
        )
        + (0 if family.experts is None else routed(config, adapted=bool(on_experts))),
        **_recurrence(layers, family),
    )


def adapter_shapes(folder: Path, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what would be trained of the adapter, by config.json alone. Raises as model_shape."""
    family, config = read_model(folder)
    everything = _linears(_graph(folder, family, config), family)
    linears = _adaptable(everything, family) | experts_of(everything, family)
    return method_for(adapter).parameter_shapes(linears, config)


def _graph(folder: Path, family: Family, config: Any) -> nn.Module:
    try:
        return build_graph(config, family, torch.float32)
    except Exception as error:  # transformers computes with whatever config.json says
        raise ModelError(
            f"{folder}/config.json does not describe a model ({type(error).__name__}: {first_line(error)})"
        ) from error


def _linears(graph: nn.Module, family: Family) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in graph.named_modules()
        if isinstance(module, nn.Linear) and name != family.head
    }


def experts_of(linears: Mapping[str, tuple[int, int]], family: Family) -> dict[str, tuple[int, ...]]:
    """transformers' parameters of experts -> (experts, out, in), of the linear layers' shapes by path."""
    found: dict[str, tuple[int, ...]] = {}
    for path, (out, in_) in linears.items():
        if (place := parameter_and_number(family.public_name(path))) is not None:
            name, number = place
            beside = found[name][1] if found.get(name, (0,))[0] == number + 1 else 0
            found[name] = (number + 1, beside + out, in_)
    return found


def _adaptable(linears: Mapping[str, tuple[int, int]], family: Family) -> dict[str, tuple[int, ...]]:
    return {family.public_name(name): size for name, size in linears.items() if family.adapts(name)}


def stored_bytes(config: Any) -> int:
    """Bytes of a weight by config.json, which need not say it."""
    return 4 if getattr(config, "dtype", None) is torch.float32 else 2


def intermediate(config: Any, family: Family) -> int:
    """The width of a token's MLP: of all experts that it goes through, where it has experts."""
    width = int(getattr(config, family.intermediate))
    if family.experts is None:
        return width
    beside = getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) > 1
    through = int(config.num_experts_per_tok * getattr(config, family.experts.width))
    return max(width, through) if beside else through


def idle(linears: Mapping[str, tuple[int, int]], config: Any) -> int:
    """Weights of the experts that a token does not go through, of the linear layers' shapes by path."""
    count, through = int(config.num_experts), int(config.num_experts_per_tok)
    of_experts = sum(prod(size) for name, size in linears.items() if f".{EXPERTS}." in name)
    return of_experts * (count - through) // max(1, count)


def routed(config: Any, *, adapted: bool) -> int:
    """Numbers of a token that a layer of experts keeps further: each output before its weight, and the router's.

    `adapted`: whether experts have adapters, so that their inputs are kept, too.
    """
    copies = 2 if adapted else 1
    return int(copies * config.num_experts_per_tok * config.hidden_size + 4 * config.num_experts)


SMALL_KEPT = 256
"""Numbers of a token in a layer: scales of norms, attention's statistics, inner products of adapters. Elsewhere they
are covered by attention's output, which memory.layer_bytes counts twice; where it is gated, it is there twice."""


def _mean(numbers: Iterable[int]) -> int:
    """Rounded up."""
    found = list(numbers)
    return -(-sum(found) // len(found))


def further_kept(
    layer: Mapping[str, nn.Module], hidden: int, queries: int, keys: int, *, beside: bool
) -> int:
    """Numbers of a token that a decoder layer keeps for its backward pass, and a Llama layer does not.

    The inputs of norms behind attention and MLP, where there are norms before them, too; queries and keys before their
    norms; or the one projection that holds them beside the values. With a gate of attention's output, the gate, and its
    projection beside the queries. A delta network keeps its projections, and for an adapter its output, in place of all
    that attention keeps.

    Args:
        layer: its modules by path.
        hidden: the hidden size.
        queries: all heads of them, times their size.
        keys: as queries.
        beside: adapters stand beside linear layers, so that these keep their inputs.
    """
    ends = {path.rpartition(".")[2]: module for path, module in layer.items()}
    if "in_proj_qkv" in ends:
        projections = [ends[name] for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")]
        kept = sum(_out(module) for module in projections) - 2 * (queries + keys) + SMALL_KEPT
        return kept + (_out(ends["in_proj_z"]) - queries if beside else 0)
    norms = sum(name.endswith("norm") for name in ends.keys() - {"q_norm", "k_norm"})
    gate = 2 * queries + SMALL_KEPT if "q_proj" in ends and _out(ends["q_proj"]) == 2 * queries else 0
    projected = queries + keys if ends.keys() & {"q_norm", "qkv_proj"} else 0
    return max(0, norms - 2) * hidden + projected + gate


def _out(linear: Any) -> int:
    return int(linear.out_features)


def _recurrence(layers: Sequence[nn.Module], family: Family) -> dict[str, int]:
    """The part of a ModelShape about recurrent layers.

    A token's operations: with the keys of its chunk twice, the triangular system, its values once; with the state three
    times.
    """
    nets: list[Any] = [] if family.delta_net is None else [
        net for layer in layers if (net := getattr(layer, family.delta_net, None)) is not None
    ]  # fmt: skip
    if not nets:
        return {}
    heads = Heads.of(nets[0])
    k, v = heads.key_size, heads.value_size
    of_head = 2 * CHUNK * (2 * k + v) + CHUNK * (k + v) + 6 * k * v
    return {
        "recurrent_layers": len(nets),
        "recurrent_width": heads.width,
        "recurrent_heads": heads.keys,
        "recurrent_flops": heads.values * of_head,
    }


def positions(config: Any) -> int | None:
    """The longest sample, in tokens, by config.json; None where that does not say.

    Scaled rotary embeddings reach `factor` times as far as the model was first trained to, whether or not
    max_position_embeddings has been raised to that.
    """
    written = getattr(config, "max_position_embeddings", None)
    if written is None:
        return None
    longest = _number("max_position_embeddings", written)
    return min(_reach(rope, longest) for rope in rotary_parameters(config))


def _reach(rope: dict[str, Any], written: float) -> int:
    first, factor = (
        _number(f"{name} of the rotary embeddings", rope.get(name) or otherwise)
        for name, otherwise in (("original_max_position_embeddings", written), ("factor", 1.0))
    )
    return int(max(written, first * factor))


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not isfinite(value):
        raise ModelError(f"config.json: {name} must be a number, not {str(value)[:100]}")
    return value
