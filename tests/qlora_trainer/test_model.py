"""Loading, refusing and running base models."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_trainer import packing
from qlora_trainer.adapter import AdapterParameters, Dropout, LoraLinear, attach_adapters
from qlora_trainer.batch import collate
from qlora_trainer.data import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.evaluate import evaluate
from qlora_trainer.model import (
    BaseModel,
    Scheme,
    fingerprint,
    load_model,
    read_config,
    target_layers,
    weight_files,
)
from qlora_trainer.quantise import Nf4Weight, quantise_nf4, to_tensors
from qlora_trainer.session import Agreed

Make = Callable[..., Path]
Tensors = dict[str, Tensor]
VOCABULARY = 300
WORDS = {"vocab_size": VOCABULARY}
LIVELY = {**WORDS, "initializer_range": 0.12}
"""Weights large enough for lively attention."""
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread, so that bits can be compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def copied(small_model: Make, tmp_path: Path) -> Make:
    """make(...) as small_model, but a copy that a test may damage."""

    def make(*args: Any, **config: Any) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(small_model(*args, **{**WORDS, **config}), folder)
        return folder

    return make


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """Change the tensors of model.safetensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


def configure(folder: Path, **values: Any) -> Path:
    """Change config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def random_samples(lengths: list[int]) -> Samples:
    """Samples of these lengths; about half of the tokens are learnt."""
    random = np.random.default_rng(3)
    offsets = np.cumsum([0, *lengths])
    ids = random.integers(0, VOCABULARY, offsets[-1]).astype(np.int32)
    mask = (random.random(offsets[-1]) < 0.5).astype(np.uint8)
    mask[offsets[1:] - 1] = 1
    mask[offsets[:-1]] = 0
    return Samples(ids, mask, offsets)


SAMPLES = random_samples([11, 4, 17, 2, 9])
EVERY = list(range(len(SAMPLES)))


def adapted(
    folder: Path, scheme: Scheme = "nf4-double", dropout: Dropout | None = None
) -> tuple[BaseModel, AdapterParameters]:
    """A model that trains, with a random adapter whose B is not zero."""
    model = load_model(folder, scheme, torch.float32)
    model.graph.train()
    parameters = attach_adapters(model.linears, rank=3, alpha=7.0, dropout=dropout, seed=0)
    noise = torch.randn(parameters.flat.shape, generator=torch.Generator().manual_seed(1))
    parameters.flat.data.add_(noise, alpha=0.1)
    return model, parameters


def gradient(
    model: BaseModel, parameters: AdapterParameters, groups: list[list[int]]
) -> tuple[float, Tensor]:
    """Summed loss and flat gradient over these rows of samples."""
    parameters.gradient.zero_()
    loss = 0.0
    for numbers in groups:
        summed = model.loss(collate(SAMPLES, numbers))
        summed.backward()  # type: ignore[no-untyped-call]
        loss += float(summed.detach())
    return loss, parameters.gradient.clone()


def loss_of(model: BaseModel) -> float:
    """Summed loss of all samples, without gradients."""
    with torch.no_grad():
        return float(model.loss(collate(SAMPLES, EVERY)))


def by_transformers(folder: Path) -> float:
    """The same by the stock model in fp32, each sample alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    for number in EVERY:
        batch = collate(SAMPLES, [number])
        with torch.no_grad():
            logits = model(input_ids=batch.ids[None]).logits[0].double()
        total -= float(logits.log_softmax(-1)[batch.rows, batch.targets].sum())
    return total


# --- loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_unquantised_model_is_transformers(kind: str, tied: bool, dtype: str, small_model: Make) -> None:
    """Without quantisation the loss is the stock model's, for each architecture, head and stored type."""
    folder = small_model(kind, dtype, **LIVELY, tie_word_embeddings=tied)

    assert loss_of(load_model(folder, "none", torch.float32)) == pytest.approx(
        by_transformers(folder), rel=1e-6
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mapped_weights_give_the_same_loss(dtype: str, small_model: Make) -> None:
    """As stored and mapped, not copied, the weights give the loss of loaded ones, bit for bit."""
    folder = small_model("llama", dtype, **LIVELY)

    mapped = load_model(folder, "as-stored", torch.float32)
    assert loss_of(mapped) == loss_of(load_model(folder, "none", torch.float32))


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double"])
def test_every_linear_but_the_head_is_quantised(scheme: Scheme, small_model: Make) -> None:
    """The layers hold the quantiser's bytes of the file's tensors; the head keeps its stored type."""
    folder = small_model("llama", "bfloat16", **LIVELY, tie_word_embeddings=False)
    stored = load_file(folder / "model.safetensors")
    model = load_model(folder, scheme, torch.float32)

    assert len(model.linears) == 2 * 7
    for name, layer in model.linears.items():
        assert isinstance(layer.weight, Nf4Weight)
        expected = quantise_nf4(stored[f"{name}.weight"], double=scheme == "nf4-double", name=name)
        for key, tensor in to_tensors(expected).items():
            assert torch.equal(to_tensors(layer.weight)[key], tensor), name
    assert torch.equal(model.head, stored["lm_head.weight"])
    assert model.head.dtype == torch.bfloat16


def test_tied_head_is_the_embedding(small_model: Make) -> None:
    """A tied head takes no memory of its own."""
    model = load_model(small_model("llama", **WORDS), "none", torch.float32)
    embedding: Any = model.graph.get_submodule("embed_tokens")

    assert model.head.data_ptr() == embedding.weight.data_ptr()


def test_nothing_of_the_base_is_trained(small_model: Make) -> None:
    """No tensor of the base asks for a gradient, and none is left on the meta device."""
    model = load_model(small_model("qwen2", **WORDS), "nf4-double", torch.float32)
    tensors = [*model.graph.parameters(), *model.graph.buffers()]

    assert tensors
    assert not any(t.requires_grad for t in tensors)
    assert not any(t.is_meta for t in tensors)


def test_bf16_is_near_fp32(small_model: Make) -> None:
    """Computed in bf16, the loss is that of fp32 to three digits."""
    folder = small_model("llama", "bfloat16", **LIVELY)

    found = loss_of(load_model(folder, "nf4-double", torch.bfloat16))
    assert found == pytest.approx(loss_of(load_model(folder, "nf4-double", torch.float32)), rel=5e-3)


def shard(folder: Path) -> Path:
    """Split model.safetensors into three files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        mine = names[number::3]
        save_file({n: tensors[n] for n in mine}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(mine, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def without_prefix(tensors: Tensors) -> None:
    """Name the tensors as a decoder saved alone does."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def with_extras(tensors: Tensors) -> None:
    """Add what old or tied checkpoints also hold."""
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(shard, id="shards"),
        pytest.param(lambda f: rewrite(f, without_prefix), id="decoder alone"),
        pytest.param(lambda f: rewrite(f, with_extras), id="tied head and rotary frequencies stored too"),
    ],
)
def test_other_layouts_of_the_same_checkpoint(change: Callable[[Path], Path], copied: Make) -> None:
    """Shards, a decoder's own names, and harmless extra tensors give the same model, bit for bit."""
    folder = copied("qwen3", **LIVELY)
    expected = loss_of(load_model(folder, "nf4-double", torch.float32))

    assert loss_of(load_model(change(folder), "nf4-double", torch.float32)) == expected


MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
from transformers.models.llama import modeling_llama
from qlora_trainer.model import load_model
from qlora_trainer.quantise import Nf4Weight, quantise_nf4, to_tensors

torch.set_num_threads(1)
quantise_nf4(torch.randn(64, 64), double=True, name="warm-up")

def anonymous():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.004):
        peak = max(peak, anonymous())

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(Path(sys.argv[1]), sys.argv[2], torch.float32)
done.set()
thread.join()
parts = [model.head, *model.graph.parameters()]
for layer in model.linears.values():
    parts += to_tensors(layer.weight).values() if isinstance(layer.weight, Nf4Weight) else [layer.weight]
finished = sum({t.data_ptr(): t.nbytes for t in parts}.values())
print(json.dumps({"peak": peak - before, "finished": finished}))
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """76 million random weights in bf16, with a large tied embedding."""
    folder = tmp_path_factory.mktemp("large")
    config = AutoConfig.for_model(
        "llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=28_000, tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    tensors = {n: torch.empty(s, dtype=torch.bfloat16).uniform_(-0.1, 0.1) for n, s in shapes.items()}
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, folder / "model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4-double", "none"])
def test_loading_never_holds_the_whole_model_in_full(scheme: str, large_model: Path) -> None:
    """While a model is streamed, anonymous memory stays below 1.3 times the finished model and its largest tensor."""
    largest = 28_000 * 1024 * 2
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_model), scheme],
        capture_output=True, text=True, check=True, timeout=120, env=environment,
    )  # fmt: skip
    found = json.loads(ended.stdout.splitlines()[-1])

    assert 0.5 * found["finished"] < found["peak"] <= 1.3 * found["finished"] + largest


# --- refusing


def cut(file: Path, to: int) -> None:
    """Keep the first bytes of a file."""
    file.write_bytes(file.read_bytes()[:to])


def poison(value: float, name: str) -> Callable[[Path], Any]:
    """Put one value into the middle of a tensor."""

    def change(tensors: Tensors) -> None:
        flat = tensors[name].view(-1)
        flat[flat.numel() // 2] = value

    return lambda folder: rewrite(folder, change)


def replace(name: str, tensor: Tensor) -> Callable[[Path], Any]:
    """Add a tensor, or put it in another's place."""
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


def index(text: str) -> Callable[[Path], Any]:
    """Write an index of shards."""
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "linear missing": (lambda f: rewrite(f, lambda t: t.pop(Q_PROJ)), f"lacks 1 tensors, such as {Q_PROJ}"),
    "norm missing": (lambda f: rewrite(f, lambda t: t.pop(NORM)), f"lacks 1 tensors, such as {NORM}"),
    "embedding missing": (lambda f: rewrite(f, lambda t: t.pop(EMBEDDING)), EMBEDDING),
    "untied head missing": (lambda f: configure(f, tie_word_embeddings=False), "lm_head.weight"),
    "layer missing": (
        lambda f: configure(f, num_hidden_layers=3),
        r"lacks 9 tensors, such as model\.layers\.2",
    ),
    "layer too many": (lambda f: configure(f, num_hidden_layers=1), r"model\.layers\.1\."),
    "misshapen": (replace(Q_PROJ, torch.zeros(64, 32)), rf"{Q_PROJ} has shape \(64, 32\).*\(64, 64\)"),
    "transposed": (
        replace("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 96)),
        "up_proj.weight has shape",
    ),
    "vocabulary differs": (lambda f: configure(f, vocab_size=301), f"{EMBEDDING} has shape"),
    "bias that config.json denies": (
        replace("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)),
        "q_proj.bias",
    ),
    "unknown tensor": (replace("model.layers.0.mlp.extra.weight", torch.zeros(2, 2)), "mlp.extra.weight"),
    "head differs from what it is tied to": (
        replace("lm_head.weight", torch.zeros(VOCABULARY, 64)),
        "lm_head.weight",
    ),
    "NaN in a linear": (poison(math.nan, Q_PROJ), f"{Q_PROJ}.*NaN"),
    "infinity in a linear": (poison(math.inf, Q_PROJ), Q_PROJ),
    "NaN in a norm": (poison(math.nan, NORM), f"{NORM} holds NaN"),
    "minus infinity in the embedding": (poison(-math.inf, EMBEDDING), f"{EMBEDDING} holds NaN or infinite"),
    "integers": (replace(Q_PROJ, torch.zeros(64, 64, dtype=torch.int8)), Q_PROJ),
    "cut in the data": (lambda f: cut(f / "model.safetensors", 100_000), "model.safetensors is not a whole"),
    "cut in the header": (lambda f: cut(f / "model.safetensors", 100), "model.safetensors is not a whole"),
    "empty file": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors is not a whole"),
    "index is no JSON": (index("{"), "index.json is not an index"),
    "index without a map": (index("{}"), "index.json is not an index"),
    "index of numbers": (
        index('{"weight_map": {"a": 1}}'),
        "lacks 1, which model.safetensors.index.json names",
    ),
    "index of a list": (index("[]"), "index.json is not an index"),
    "shard missing": (index('{"weight_map": {"a": "other.safetensors"}}'), "lacks other.safetensors"),
    "shard elsewhere": (
        index('{"weight_map": {"a": "../model.safetensors"}}'),
        r"lacks \.\./model.safetensors",
    ),
}


@pytest.mark.parametrize("scheme", ["nf4-double", "none"])
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_refuses_damaged_checkpoints(
    damage: Callable[[Path], Any], message: str, scheme: Scheme, copied: Make
) -> None:
    """What is missing, misshapen, unknown, not finite or cut off is a ModelError that names it."""
    folder = copied("llama")
    damage(folder)

    with pytest.raises(ModelError, match=message):
        load_model(folder, scheme, torch.float32)


def test_refuses_a_tensor_given_twice(copied: Make) -> None:
    """A tensor that two shards hold is refused: which one is meant is not known."""
    folder = shard(copied("llama"))
    first, second = weight_files(folder)[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, {"format": "pt"})

    with pytest.raises(ModelError, match=name):
        load_model(folder, "none", torch.float32)


CONFIGURATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "has no config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "other architecture": (lambda f: configure(f, model_type="gpt2"), "'gpt2' model; those supported: llama, mistral"),
    "unknown architecture": (lambda f: configure(f, model_type="nonesuch"), "config.json cannot be read"),
    "wrong type": (lambda f: configure(f, hidden_size="wide"), "config.json cannot be read.*hidden_size"),
    "quantised": (
        lambda f: configure(f, quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised already",
    ),
    "dynamic rope": (
        lambda f: configure(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'",
    ),
    "old dynamic rope": (
        lambda f: configure(f, rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_refuses_what_it_cannot_train_exactly(
    damage: Callable[[Path], Any], message: str, copied: Make
) -> None:
    """config.json is refused, with the reason, before any weight is read."""
    folder = copied("llama")
    damage(folder)

    with pytest.raises(ModelError, match=message):
        read_config(folder)


# --- what is adapted


def linears(small_model: Make) -> dict[str, LoraLinear]:
    """The linear layers of a model of two layers."""
    return load_model(small_model("llama", **WORDS), "none", torch.float32).linears


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        pytest.param(["q_proj"], ["0.self_attn.q_proj", "1.self_attn.q_proj"], id="last part"),
        pytest.param(["model.layers.1.mlp.up_proj"], ["1.mlp.up_proj"], id="whole path"),
        pytest.param(
            ["up_proj", "down_proj"],
            ["0.mlp.up_proj", "0.mlp.down_proj", "1.mlp.up_proj", "1.mlp.down_proj"],
            id="several, in the model's order",
        ),
        pytest.param(
            ["layers.1.mlp.up_proj", "up_proj"],
            ["0.mlp.up_proj", "1.mlp.up_proj"],
            id="overlapping, each once",
        ),
    ],
)
def test_targets(targets: list[str], expected: list[str], small_model: Make) -> None:
    """Targets are last parts or whole paths, as in PEFT."""
    found = target_layers(linears(small_model), targets)

    assert sorted(found) == sorted(f"model.layers.{name}" for name in expected)


def test_all_linear_is_every_linear(small_model: Make) -> None:
    """`all-linear` names all layers, whatever else is named."""
    layers = linears(small_model)

    assert target_layers(layers, ["all-linear"]) == layers
    assert len(layers) == 14


@pytest.mark.parametrize("target", ["proj", "lm_head", "q", "embed_tokens", "layers.7.mlp.up_proj", "Q_PROJ"])
def test_unknown_targets_name_those_that_exist(target: str, small_model: Make) -> None:
    """A target that names no layer is refused with the names there are."""
    with pytest.raises(
        ModelError, match=rf"'{target}'.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ):
        target_layers(linears(small_model), ["q_proj", target])


# --- running


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param("llama", {}, id="llama"),
        pytest.param("qwen2", {}, id="qwen2"),
        pytest.param("qwen3", {}, id="qwen3"),
        pytest.param("mistral", {"sliding_window": 5}, id="mistral, sliding"),
    ],
)
def test_packed_equals_unpacked(kind: str, config: dict[str, Any], small_model: Make) -> None:
    """Samples in one row give the loss and gradients of the same samples run alone, or packed in another way."""
    model, parameters = adapted(small_model(kind, **LIVELY, **config))
    loss, expected = gradient(model, parameters, [[n] for n in EVERY])

    for groups in ([EVERY], [EVERY[::-1]], [[3, 0], [2], [1, 4]]):
        packed_loss, packed = gradient(model, parameters, groups)
        assert packed_loss == pytest.approx(loss, rel=1e-6)
        assert float((packed - expected).norm() / expected.norm()) < 1e-5


def test_each_sample_is_the_same_in_a_row(small_model: Make) -> None:
    """The hidden states of every sample in a packed row are those of the sample alone."""
    model, _ = adapted(small_model("llama", **LIVELY))
    model.graph.eval()

    def hidden(numbers: list[int]) -> Tensor:
        batch = collate(SAMPLES, numbers)
        with torch.no_grad():
            out: Tensor = model.graph(
                input_ids=batch.ids[None], position_ids=batch.positions[None], segment_lengths=batch.lengths,
                use_cache=False,
            ).last_hidden_state[0]  # fmt: skip
        return out

    for number, part in zip(EVERY, torch.split(hidden(EVERY), SAMPLES.lengths().tolist()), strict=True):
        torch.testing.assert_close(part, hidden([number]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probability", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_recomputing_layers_changes_nothing(probability: float, small_model: Make) -> None:
    """Full checkpointing gives the same loss and gradients bit for bit, dropout's masks included."""
    results = []
    for recompute in (False, True):
        dropout = Dropout(probability, 0) if probability else None
        model, parameters = adapted(small_model("llama", **LIVELY), dropout=dropout)
        if dropout is not None:
            dropout.at(0, [(0, int(SAMPLES.lengths().sum()))])
        if recompute:
            model.checkpoint_layers()
        results.append(gradient(model, parameters, [EVERY]))

    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_recomputing_keeps_less(small_model: Make) -> None:
    """Full checkpointing really drops what a layer would keep for the backward pass."""
    kept = []
    for recompute in (False, True):
        model, _ = adapted(small_model("llama", **LIVELY))
        if recompute:
            model.checkpoint_layers()
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.loss(collate(SAMPLES, EVERY))
        kept.append(sum(sizes))

    assert kept[1] < kept[0] / 4


def test_dropout_does_not_depend_on_the_micro_batch(small_model: Make) -> None:
    """Bins run together or one by one meet the same masks: loss and gradients agree."""
    dropout = Dropout(0.3, 0)
    model, parameters = adapted(small_model("llama", **LIVELY), dropout=dropout)
    lengths = SAMPLES.lengths().tolist()
    results = []
    for groups in ([EVERY], [[0, 1], [2, 3, 4]], [[n] for n in EVERY]):
        parameters.gradient.zero_()
        loss = 0.0
        for numbers in groups:
            dropout.at(4, [(n, lengths[n]) for n in numbers])
            summed = model.loss(collate(SAMPLES, numbers))
            summed.backward()  # type: ignore[no-untyped-call]
            loss += float(summed.detach())
        results.append((loss, parameters.gradient.clone()))

    for loss, flat in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert float((flat - results[0][1]).norm() / flat.norm()) < 1e-5


@pytest.mark.parametrize("scheme", ["nf4-double", "none"])
def test_evaluation_leaves_training_alone(scheme: Scheme, small_model: Make) -> None:
    """An evaluation between two steps changes no gradient, generator or mode, and no bit of the next step."""
    dropout = Dropout(0.3, 0)
    dropout.at(0, [(0, int(SAMPLES.lengths().sum()))])
    model, parameters = adapted(small_model("llama", **LIVELY), scheme, dropout)
    before = gradient(model, parameters, [EVERY])
    state = torch.get_rng_state()
    session: Any = SimpleNamespace(
        run=SimpleNamespace(training=SimpleNamespace(max_sequence_length=20)),
        world=SimpleNamespace(rank=0, size=1),
        stop=threading.Event(),
        agree=lambda sums: Agreed(stopping=False, sums=sums, each=[]),
    )
    found = evaluate(session, model, SAMPLES, 30)

    assert torch.equal(parameters.gradient, before[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.graph.modules())
    after = gradient(model, parameters, [EVERY])
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])
    model.graph.eval()
    supervised = int(SAMPLES.supervised_counts().sum())
    assert found == pytest.approx(loss_of(model) / supervised, rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_evaluation_is_the_same_over_any_number_of_ranks(ranks: int, small_model: Make) -> None:
    """Ranks' sums, those of ranks without a bin included, add up to the loss of one rank."""
    model, _ = adapted(small_model("llama", **LIVELY))

    def sums(rank: int, size: int) -> list[float]:
        kept: list[list[float]] = []

        def agree(mine: list[float]) -> Agreed:
            kept.append(mine)
            return Agreed(stopping=False, sums=[1.0, 1.0], each=[])

        session: Any = SimpleNamespace(
            run=SimpleNamespace(training=SimpleNamespace(max_sequence_length=20)),
            world=SimpleNamespace(rank=rank, size=size),
            stop=threading.Event(),
            agree=agree,
        )
        evaluate(session, model, SAMPLES, 30)
        return kept[0]

    shares = [sums(rank, ranks) for rank in range(ranks)]
    alone = sums(0, 1)

    assert sum(loss for loss, _ in shares) == pytest.approx(alone[0], rel=1e-6)
    assert sum(count for _, count in shares) == alone[1] == int(SAMPLES.supervised_counts().sum())
    bins = packing.pack(SAMPLES.lengths(), np.arange(len(SAMPLES)), 20, packing=True)
    assert sum(count > 0 for _, count in shares) == min(ranks, len(bins))


# --- telling models apart


def test_fingerprint_tells_models_apart(copied: Make) -> None:
    """Copies have one fingerprint; another configuration, tensor or split has another."""
    folder = copied("llama")
    found = {
        fingerprint(folder),
        fingerprint(copied("llama", "bfloat16")),
        fingerprint(configure(copied("llama"), rms_norm_eps=1e-5)),
        fingerprint(shard(copied("llama"))),
    }

    assert len(found) == 4
    assert fingerprint(copied("llama")) == fingerprint(folder)
