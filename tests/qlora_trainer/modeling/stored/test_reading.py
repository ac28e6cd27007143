"""Models that are stored quantized: read weight by weight, and quantized again."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from model_folders import by_transformers, configure, shard
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.families import read_config
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.stored.formats import description
from qlora_trainer.modeling.stored.reading import stored_weights
from qlora_trainer.modeling.weight_files import WeightsHash, bytes_per_weight
from qlora_trainer.quantization.nf4 import quantize_nf4
from qlora_trainer.quantization.schemes import AsStored, Nf4, Unquantized
from stored_forms import FORMS, Form, plain_twin, store

pytestmark = pytest.mark.process

Make = Callable[..., Path]
Loss = Callable[..., Tensor]
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_bytes_of_its_dequantized_weights(
    form: Form, copied: Make, tmp_path: Path, samples: Samples, loss_of: Loss
) -> None:
    """Quantized again, each weight has the NF4 bytes of what it is worth; unquantized, the model is the stock one."""
    folder = copied("llama", **LIVELY)
    worth = store(folder, form)
    model: Any = load_model(folder, Nf4(double=True), torch.float32)

    assert len(worth) == 2 * 7
    for path, weight in worth.items():
        expected: Any = quantize_nf4(weight, double=True, name=path)
        found = model.linears[path].weight.matrix
        assert torch.equal(found.packed, expected.packed), path
        assert torch.equal(found.scales.codes, expected.scales.codes), path
        assert torch.equal(found.scales.absmax, expected.scales.absmax), path
    stock = by_transformers(plain_twin(folder, tmp_path / "plain", worth), samples)
    assert float(loss_of(load_model(folder, Unquantized(), torch.float32))) == pytest.approx(stock, rel=1e-6)
    assert float(loss_of(load_model(folder, AsStored(), torch.float32))) == pytest.approx(stock, rel=1e-6)
    assert form.says in description(folder, read_config(folder))


def test_parts_of_a_weight_may_be_in_several_files(copied: Make, loss_of: Loss) -> None:
    """A weight in one shard and its scales in another give the model of the single file."""
    folder = copied("llama", **LIVELY)
    store(folder, FORMS["fp8 blocks"])
    expected = loss_of(load_model(folder, Nf4(double=True), torch.float32))

    assert torch.equal(loss_of(load_model(shard(folder), Nf4(double=True), torch.float32)), expected)


def hash_of(folder: Path) -> str:
    """The hash of all weights, as loading takes it."""
    taken = WeightsHash(2)
    load_model(folder, Nf4(double=False), torch.float32, weights_hash=taken)
    return taken.hexdigest()


@pytest.mark.parametrize("ending", [".weight", ".weight_scale_inv"])
def test_the_hash_is_of_everything_that_is_stored(ending: str, copied: Make) -> None:
    """Another code or another scale is another model; shards are the same one."""
    folder = copied("llama", **LIVELY)
    store(folder, FORMS["fp8 blocks"])
    before = hash_of(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors[Q_PROJ + ending].view(torch.uint8)[1, 2] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    assert hash_of(folder) != before
    tensors[Q_PROJ + ending].view(torch.uint8)[1, 2] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert hash_of(shard(folder)) == before


def test_what_serves_only_quantized_arithmetic_is_passed_over(copied: Make, loss_of: Loss) -> None:
    """Scales of activations and of the key-value cache are in the files, and change nothing."""
    folder = copied("llama", **LIVELY)
    store(folder, FORMS["fp8 blocks"])
    expected = loss_of(load_model(folder, Unquantized(), torch.float32))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{Q_PROJ}.activation_scale": torch.ones(()), f"{Q_PROJ}.k_scale": torch.ones(())}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    assert torch.equal(loss_of(load_model(folder, Unquantized(), torch.float32)), expected)


def without(ending: str) -> Callable[[dict[str, Tensor]], Any]:
    """Take a part away."""
    return lambda tensors: tensors.pop(Q_PROJ + ending)


def of_shape(ending: str, *shape: int) -> Callable[[dict[str, Tensor]], Any]:
    """Give a part another shape."""
    return lambda t: t.update({Q_PROJ + ending: torch.ones(shape, dtype=t[Q_PROJ + ending].dtype)})


DAMAGE: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("fp8 blocks", without(".weight_scale_inv"), "q_proj.weight is stored in FP8.*lacks its 'scale'"),
    ("fp8 blocks", without(".weight"), "q_proj.weight is stored in FP8.*lacks its 'weight'"),
    ("fp8 blocks", of_shape(".weight_scale_inv", 3, 2), r"q_proj.weight cannot be read from FP8.*\[3, 2\]"),
    ("compressed int4", without(".weight_scale"), "lacks its 'scale'"),
    ("compressed int4", without(".weight_shape"), "lacks its 'shape'"),
    ("compressed int4", of_shape(".weight_scale", 64, 5), r"scales of shape \[64, 5\]"),
    ("compressed int4", of_shape(".weight_packed", 64, 11), "neither 4 nor 8 bits"),
    ("compressed int8", of_shape(".weight_scale", 63, 1), r"scales of shape \[63, 1\]"),
    ("bitsandbytes nf4", without(".weight.absmax"), "lacks its 'absmax'"),
    ("bitsandbytes nf4", without(".weight.quant_state.bitsandbytes__nf4"), "lacks its 'quant state'"),
    ("bitsandbytes nf4, nested", of_shape(".weight.absmax", 7), "7 scales"),
    ("bitsandbytes int8", of_shape(".SCB", 5), "5 scales"),
    ("gptq", without(".qzeros"), "lacks its 'zeros'"),
    ("gptq", of_shape(".scales", 3, 64), r"scales \[64, 3\]"),
    ("awq", of_shape(".scales", 3, 64), r"scales \[3, 64\]"),
    ("awq", without(".qweight"), "lacks its 'codes'"),
]


@pytest.mark.parametrize(("form", "damage", "message"), DAMAGE, ids=[f"{form}: {m}" for form, _, m in DAMAGE])
def test_refuses_parts_that_are_missing_or_do_not_fit(
    form: str, damage: Callable[[dict[str, Tensor]], Any], message: str, copied: Make
) -> None:
    """A damaged checkpoint is a ModelError that names the weight, the form and what is wrong."""
    folder = copied("llama", **LIVELY)
    store(folder, FORMS[form])
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(ModelError, match=message):
        load_model(folder, Nf4(double=True), torch.float32)


def test_numbers_that_nothing_explains_are_refused(copied: Make) -> None:
    """Without a quantization_config nobody knows what FP8 numbers are worth."""
    folder = copied("llama", **LIVELY)
    store(folder, FORMS["fp8 tensors"])
    configure(folder, quantization_config=None)

    with pytest.raises(ModelError, match=r"_proj\.weight.*"):
        load_model(folder, Nf4(double=True), torch.float32)


def test_memory_counts_the_embedding_as_it_is_stored(copied: Make) -> None:
    """What is said of the embedding's numbers is not taken from packed codes or scales."""
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        folder = copied("llama", dtype, **LIVELY)
        store(folder, FORMS["compressed int4"])

        assert bytes_per_weight(folder) == size


def test_a_weight_is_not_read_before_it_is_asked_for(copied: Make) -> None:
    """What is stored is mapped; to list a model's weights dequantizes none."""
    folder = copied("llama", **LIVELY)
    worth = store(folder, FORMS["gptq"])
    weights = {weight.name: weight for weight in stored_weights(folder, read_config(folder))}

    assert weights.keys() >= {f"{path}.weight" for path in worth}
    assert weights[f"{Q_PROJ}.weight"].dequantized
    assert not weights["model.norm.weight"].dequantized
    assert sum(weight.nbytes for weight in weights.values()) < (folder / "model.safetensors").stat().st_size
    assert torch.equal(weights[f"{Q_PROJ}.weight"].read(), worth[Q_PROJ])


MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
from transformers.models.llama import modeling_llama
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.quantization.nf4 import quantize_nf4
from qlora_trainer.quantization.schemes import Nf4

torch.set_num_threads(1)
quantize_nf4(torch.randn(64, 64), double=True, name="warm-up")

def anonymous():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(Path(sys.argv[1]), Nf4(double=True), torch.float32)
done.set()
thread.join()
finished = sum({t.data_ptr(): t.nbytes for t in [model.head, *model.graph.parameters()]}.values())
finished += sum(layer.weight.nbytes for layer in model.linears.values())
print(json.dumps({"peak": peak - before, "finished": finished}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8 tensors", "gptq"])
def test_reading_never_holds_the_whole_model_in_full(form: str, tmp_path: Path) -> None:
    """48 million weights are dequantized and quantized again within a few times the largest of them."""
    config = AutoConfig.for_model(
        "llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=1000, tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    tensors = {n: torch.empty(s, dtype=torch.bfloat16).uniform_(-0.1, 0.1) for n, s in shapes.items()}
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, tmp_path / "model.safetensors")
    layers = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("_proj.weight"))
    if form == "fp8 tensors":  # the writer of tests counts one by one
        stored = {
            n: t.to(torch.float8_e4m3fn) if n.endswith("_proj.weight") else t for n, t in tensors.items()
        }
        stored |= {f"{n}_scale_inv": torch.ones(()) for n in tensors if n.endswith("_proj.weight")}
        save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
        configure(tmp_path, quantization_config=FORMS[form].settings)
    else:
        store(tmp_path, FORMS[form])
    # glibc would come to keep what is freed, instead of giving it back.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(4 << 20)}
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=120, env=environment,
    )  # fmt: skip
    found = json.loads(ended.stdout.splitlines()[-1])

    largest = 2816 * 1024 * 4
    assert 0.5 * found["finished"] < found["peak"] <= 1.3 * found["finished"] + 5 * largest < 4 * layers
