"""The trainer against transformers, peft and bitsandbytes: the same bytes, loss, gradients and adapter.

Ours runs packed rows through the loop's own `accumulate`, its ranks one after another; theirs runs each sample
alone through the stock libraries, with the adapter that ours has written.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig

from model_folders import stock_model
from parity_cases import PARITY_CASES, WIDE
from qlora_contract.run_config import Adapter, Dataset, JobRef, Layout, ModelSource, RunConfig, Training
from qlora_trainer.artifacts import adapter as adapter_module
from qlora_trainer.data import packing
from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples, load
from qlora_trainer.data.packing import Step
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.adapter_parameters import PEFT_PREFIX, AdapterParameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.quantization.kernels.compiled import CompiledNf4Weight
from qlora_trainer.quantization.kernels.reference import Nf4Weight
from qlora_trainer.quantization.nf4 import NestedScales
from qlora_trainer.quantization.schemes import Nf4, Scheme, Unquantized
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.telemetry.progress import Progress, starting_report
from qlora_trainer.training.loop import accumulate
from qlora_trainer.training.objective import SupervisedFineTuning

pytestmark = pytest.mark.process

NF4, DOUBLE, NONE = Nf4(double=False), Nf4(double=True), Unquantized()
SCHEMES = {"nf4": NF4, "nf4, double": DOUBLE, "none": NONE}
"""By the names in the table of cases."""
LOSS_TOLERANCE = 1e-5
"""Difference of the mean losses."""
GRADIENT_TOLERANCE = 1e-4
"""Relative Frobenius error of each adapter matrix's gradient."""
LOGITS_TOLERANCE = 1e-5
"""Largest difference of logits over the largest logit: fp32 rounding through all layers."""


# --- ours


@dataclass
class Ours:
    """A base with a random adapter, and the same adapter as it is published."""

    model: BaseModel
    parameters: AdapterParameters
    written: Path


def run_config(targets: list[str]) -> RunConfig:
    """alpha / rank is neither 1 nor 2; no dropout; fp32."""
    return RunConfig(
        job=JobRef(name="parity", uid="u", attempt=0),
        workspace="pvc://data",
        model=ModelSource(source="pvc://data/model"),
        dataset=Dataset(source="pvc://data/train.jsonl"),
        adapter=Adapter(rank=4, alpha=6.0, dropout=0.0, target_modules=targets),
        training=Training(max_steps=1, compute_dtype="fp32"),
        layout=Layout(memory_per_rank=2**34),
        isa="avx2",
    )


def make_ours(folder: Path, scheme: Scheme, to: Path, targets: list[str]) -> Ours:
    """Load and quantise the base, give it a random adapter with B not zero, and write that adapter."""
    run = run_config(targets)
    model = load_model(folder, scheme, torch.float32)
    model.graph.train()
    parameters = method_for(run.adapter).attach(model, seed=0, dropout=None)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.named.values():
        parameter.data.copy_(
            torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1]) / 2
        )
    return Ours(model, parameters, adapter_module.write_adapter(JobFolder(to, run), parameters, str(folder)))


def run_ranks(
    ours: Ours, samples: Samples, bins: list[list[int]], ranks: int, micro: int
) -> tuple[float, Tensor]:
    """Mean loss and flat gradient of one step, each rank's share through the training loop's own code."""
    step = Step(0, bins, packing.bin_lengths(bins, samples.lengths()))
    objective = SupervisedFineTuning()
    supervised = int(objective.counts(samples).sum())
    state: Any = SimpleNamespace(
        model=ours.model, parameters=ours.parameters, objective=objective, dropout=None,
        loop=SimpleNamespace(step=0), data=SimpleNamespace(train=samples),
        memory=SimpleNamespace(micro_batch_tokens=micro),
    )  # fmt: skip
    loss, gradient = 0.0, torch.zeros_like(ours.parameters.gradient)
    for rank in range(ranks):
        context: Any = SimpleNamespace(
            world=SimpleNamespace(rank=rank, size=ranks), tokens_trained=0, stop=threading.Event(),
            progress=Progress(starting_report(run_config(["all-linear"]))),
        )  # fmt: skip
        loss += accumulate(context, state, step, supervised)["loss"]
        gradient += ours.parameters.gradient
    return loss / supervised, gradient


def gradients(ours: Ours, flat: Tensor) -> dict[str, Tensor]:
    """A flat gradient, by the adapters' names."""
    start, base = {}, ours.parameters.flat.data_ptr()
    for name, parameter in ours.parameters.named.items():
        start[name] = (parameter.data_ptr() - base) // 4
    return {n: flat[start[n] : start[n] + p.numel()].view(p.shape) for n, p in ours.parameters.named.items()}


def our_logits(model: BaseModel, samples: Samples, numbers: list[int]) -> list[Tensor]:
    """Logits of each sample, all of them packed in one row."""
    batch = collate(samples, numbers)
    with torch.no_grad():
        logits = model.hidden_states(batch) @ model.head.float().t()
        if model.softcap is not None:
            logits = torch.tanh(logits / model.softcap) * model.softcap
        return list(torch.split(logits, batch.lengths))


# --- theirs


def peft_model(folder: Path, scheme: Scheme, adapter: Path) -> Any:
    """The stock libraries' model: base from the same folder in fp32, adapter as ours has written it."""
    from peft import PeftModel

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=scheme == DOUBLE,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options: dict[str, Any] = {} if scheme == NONE else {"quantization_config": quantized}
    base = stock_model(folder, **options)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True).train()


def their_logits(model: Any, samples: Samples, number: int) -> Tensor:
    """Logits of one sample, run alone."""
    ids = torch.from_numpy(samples.sample(number)[0].astype(np.int64))
    logits: Tensor = model(input_ids=ids[None]).logits[0].float()
    return logits


def run_theirs(model: Any, samples: Samples) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and gradients over all samples, each run alone.

    The cross-entropy of their fp32 logits is taken in fp64: in fp32, torch's log_softmax over 49,152 words is
    itself 1e-5 off in the loss and 1e-4 in the gradients.
    """
    total, supervised = 0.0, int(samples.supervised_counts().sum())
    for number in range(len(samples)):
        ids, mask = (torch.from_numpy(x.astype(np.int64)) for x in samples.sample(number))
        labels = torch.where(mask.bool(), ids, -100)
        logits = their_logits(model, samples, number)
        loss = F.cross_entropy(logits[:-1].double(), labels[1:], reduction="sum", ignore_index=-100)
        (loss / supervised).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    found = {
        n.removeprefix(PEFT_PREFIX).replace(".default.", "."): p.grad
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    return total / supervised, found


# --- the comparison


def assert_same_bytes(model: BaseModel, theirs: Any) -> None:
    """Every quantized linear has bitsandbytes' very codes and scales."""
    compared = 0
    for name, layer in model.linears.items():
        if not isinstance(layer.weight, CompiledNf4Weight | Nf4Weight):
            continue
        module = theirs.base_model.model.get_submodule(name)
        weight = getattr(module, "base_layer", module).weight
        state, ours = weight.quant_state, layer.weight.matrix
        assert torch.equal(weight.data.view(-1), ours.packed), name
        if isinstance(ours.scales, NestedScales):
            assert torch.equal(state.absmax, ours.scales.codes), name
            assert torch.equal(state.state2.absmax, ours.scales.absmax), name
            assert torch.equal(state.offset, ours.scales.offset), name
        else:
            assert torch.equal(state.absmax, ours.scales), name
        compared += 1
    assert compared in (0, len(model.linears))


def assert_close(ours: Ours, found: tuple[float, Tensor], expected: tuple[float, dict[str, Tensor]]) -> None:
    """Loss and every single gradient within tolerance."""
    mine = gradients(ours, found[1])
    assert mine.keys() == expected[1].keys()
    assert found[0] == pytest.approx(expected[0], rel=0, abs=LOSS_TOLERANCE)
    for name, theirs in expected[1].items():
        size = float(theirs.norm())
        assert size > 0, name
        assert float((mine[name] - theirs).norm()) / size <= GRADIENT_TOLERANCE, name


def assert_same_logits(ours: Ours, theirs: Any, samples: Samples) -> None:
    """Every sample's logits, packed by ours and alone by theirs."""
    packed = our_logits(ours.model, samples, list(range(len(samples))))
    for number, mine in enumerate(packed):
        with torch.no_grad():
            expected = their_logits(theirs, samples, number)
        assert float((mine - expected).abs().max()) <= LOGITS_TOLERANCE * float(expected.abs().max())


# --- small models

LENGTHS = [23, 2, 17, 30, 9, 5, 26, 12]
BINS = {
    "five": [[0, 1], [2], [3, 4, 5], [6], [7]],
    "two": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "unpacked": [[n] for n in range(len(LENGTHS))],
}


def random_samples(vocabulary: int) -> Samples:
    """Samples whose supervised tokens are some in the middle, the last, or all but the first."""
    random = np.random.default_rng(5)
    offsets = np.cumsum([0, *LENGTHS])
    ids = random.integers(0, vocabulary, offsets[-1]).astype(np.int32)
    mask = (random.random(offsets[-1]) < 0.4).astype(np.uint8)
    mask[offsets[1:] - 1] = 1
    mask[offsets[3] : offsets[4]] = 1
    mask[offsets[:-1]] = 0
    return Samples(ids, mask, offsets)


def livelier(folder: Path, to: Path) -> Path:
    """The same model with random norms and biases, which start at 1 and 0 and would hide mistakes."""
    to.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (to / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(2)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 1 or name.endswith("_bias"):
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) / 3)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@dataclass
class Pair:
    """Both sides of a comparison, theirs already run."""

    ours: Ours
    theirs: Any
    samples: Samples
    expected: tuple[float, dict[str, Tensor]]


def make_pair(folder: Path, scheme: Scheme, targets: list[str], samples: Samples, to: Path) -> Pair:
    """Build both sides and run theirs once."""
    ours = make_ours(folder, scheme, to, targets)
    theirs = peft_model(folder, scheme, ours.written)
    return Pair(ours, theirs, samples, run_theirs(theirs, samples))


@pytest.fixture(scope="module", params=list(PARITY_CASES.values()), ids=list(PARITY_CASES))
def pair(
    request: pytest.FixtureRequest, small_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """A small model on both sides."""
    kind, scheme, dtype, targets, config = request.param
    scheme = SCHEMES[scheme]
    root = tmp_path_factory.mktemp("pair")
    folder = livelier(small_model(kind, dtype, **{**WIDE, **config}), root / "model")
    return make_pair(folder, scheme, targets, random_samples(1000), root / "job")


@pytest.mark.parametrize(
    ("bins", "ranks", "micro"),
    [
        pytest.param("five", 1, 10_000, id="1 rank, all at once"),
        pytest.param("five", 1, 50, id="1 rank, micro-batches"),
        pytest.param("five", 2, 1, id="2 ranks, bin by bin"),
        pytest.param("five", 4, 10_000, id="4 ranks, 5 bins"),
        pytest.param("unpacked", 3, 60, id="3 ranks, unpacked"),
        pytest.param("two", 4, 10_000, id="4 ranks, 2 bins"),
    ],
)
def test_loss_and_gradients_equal_the_stock_libraries(pair: Pair, bins: str, ranks: int, micro: int) -> None:
    """Packed rows shared out to any number of ranks give the loss and gradients of samples run alone by peft."""
    found = run_ranks(pair.ours, pair.samples, BINS[bins], ranks, micro)

    assert_close(pair.ours, found, pair.expected)


def test_bytes_equal_bitsandbytes(pair: Pair) -> None:
    """Every linear layer is quantised to the bytes that bitsandbytes makes of it, so the comparison is exact."""
    assert_same_bytes(pair.ours.model, pair.theirs)


def test_published_adapter_gives_the_same_logits_in_peft(pair: Pair) -> None:
    """Stock peft loads the written adapter on the same quantised base and computes the same logits."""
    assert_same_logits(pair.ours, pair.theirs, pair.samples)


def test_published_adapter_is_loaded_whole(pair: Pair) -> None:
    """Stock peft finds in the written files exactly the tensors that it expects, with their values and scale."""
    loaded = {n: p for n, p in pair.theirs.named_parameters() if "lora_" in n}
    expected = {
        f"{PEFT_PREFIX}{name.replace('.weight', '.default.weight')}": p
        for name, p in pair.ours.parameters.named.items()
    }

    assert loaded.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(loaded[name], parameter), name


def test_all_linear_adapter_leaves_the_head_alone(pair: Pair) -> None:
    """Neither side adapts or quantises the output head."""
    head = pair.theirs.base_model.model.lm_head

    assert type(head) is torch.nn.Linear
    assert torch.equal(head.weight, pair.ours.model.head.float())


# --- the demo's model


@pytest.mark.slow
@pytest.mark.model
def test_demo_model_equals_the_stock_libraries(demo_model: Path, demo_data: Path, tmp_path: Path) -> None:
    """The demo's model on the demo's data: same bytes, logits, loss and gradients as peft on bitsandbytes."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model, local_files_only=True)
    source = tmp_path / "few.jsonl"
    with (demo_data / "train.jsonl").open() as stream:
        source.write_text("".join(next(stream) for _ in range(3)))
    samples = load(Dataset(source="pvc://d/few.jsonl", eval_fraction=0.0), source, tokenizer, 64).train
    pair = make_pair(demo_model, DOUBLE, ["all-linear"], samples, tmp_path / "job")
    numbers = np.arange(len(samples))
    bins = packing.pack(samples.lengths(), numbers, 128, packing=True)

    assert_same_bytes(pair.ours.model, pair.theirs)
    for ranks in (1, 3):
        assert_close(pair.ours, run_ranks(pair.ours, samples, bins, ranks, 512), pair.expected)
    assert_same_logits(pair.ours, pair.theirs, samples)
