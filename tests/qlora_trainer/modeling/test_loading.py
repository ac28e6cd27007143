"""Loading base models, and refusing what is not whole."""

import json
import math
import os
import shutil
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
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from model_folders import by_transformers, configure, shard
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.families import FAMILIES, WRAPPERS
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.weight_files import weight_files
from qlora_trainer.quantization.kernels.compiled import CompiledNf4Weight
from qlora_trainer.quantization.kernels.reference import Nf4Weight
from qlora_trainer.quantization.nf4 import NestedScales, quantize_nf4
from qlora_trainer.quantization.schemes import AsStored, Nf4, Scheme, Unquantized

pytestmark = pytest.mark.process

Make = Callable[..., Path]
Loss = Callable[..., Tensor]
Tensors = dict[str, Tensor]
VOCABULARY = 300
WORDS = {"vocab_size": VOCABULARY}
LIVELY = {**WORDS, "initializer_range": 0.12}
"""Weights large enough for lively attention."""
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOUBLE = Nf4(double=True)


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """Change the tensors of model.safetensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


# --- loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() | WRAPPERS.keys()))
def test_unquantized_model_is_transformers(
    kind: str, tied: bool, dtype: str, small_model: Make, samples: Samples, loss_of: Loss
) -> None:
    """Without quantization the loss is the stock model's, for each architecture, head and stored type."""
    folder = small_model(kind, dtype, **LIVELY, tie_word_embeddings=tied)

    found = float(loss_of(load_model(folder, Unquantized(), torch.float32)))
    assert found == pytest.approx(by_transformers(folder, samples), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mapped_weights_give_the_same_loss(dtype: str, small_model: Make, loss_of: Loss) -> None:
    """As stored and mapped, not copied, the weights give the loss of loaded ones, bit for bit."""
    folder = small_model("llama", dtype, **LIVELY)

    mapped = load_model(folder, AsStored(), torch.float32)
    assert torch.equal(loss_of(mapped), loss_of(load_model(folder, Unquantized(), torch.float32)))


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-double"])
def test_every_linear_but_the_head_is_quantized(double: bool, small_model: Make) -> None:
    """The layers hold the quantizer's bytes of the file's tensors; the head keeps its stored type."""
    folder = small_model("llama", "bfloat16", **LIVELY, tie_word_embeddings=False)
    stored = load_file(folder / "model.safetensors")
    model = load_model(folder, Nf4(double=double), torch.float32)

    assert len(model.linears) == 2 * 7
    for name, layer in model.linears.items():
        assert isinstance(layer.weight, CompiledNf4Weight | Nf4Weight)
        found = layer.weight.matrix
        expected = quantize_nf4(stored[f"{name}.weight"], double=double, name=name)
        assert found.shape == expected.shape
        assert torch.equal(found.packed, expected.packed), name
        if double:
            assert isinstance(found.scales, NestedScales)
            assert isinstance(expected.scales, NestedScales)
            assert torch.equal(found.scales.codes, expected.scales.codes), name
            assert torch.equal(found.scales.absmax, expected.scales.absmax), name
            assert torch.equal(found.scales.offset, expected.scales.offset), name
        else:
            assert isinstance(found.scales, Tensor)
            assert isinstance(expected.scales, Tensor)
            assert torch.equal(found.scales, expected.scales), name
    assert torch.equal(model.head, stored["lm_head.weight"])
    assert model.head.dtype == torch.bfloat16


def test_each_expert_is_quantized_by_itself(small_model: Make) -> None:
    """Its matrices are the quantizer's bytes of the file's; they and the router are not among what can be adapted."""
    folder = small_model("qwen3_moe", **LIVELY)
    stored = load_file(folder / "model.safetensors")
    model = load_model(folder, DOUBLE, torch.float32)

    experts = {name for name in stored if ".experts." in name}
    assert len(experts) == 2 * 4 * 3
    for name in experts:
        layer: Any = model.graph.get_submodule(name.removeprefix("model.").removesuffix(".weight"))
        assert torch.equal(
            layer.weight.matrix.packed, quantize_nf4(stored[name], double=True, name=name).packed
        )
    assert {name.rpartition(".")[2] for name in model.linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    router: Any = model.graph.get_submodule("layers.0.mlp.gate")
    assert torch.equal(router.weight, stored["model.layers.0.mlp.gate.weight"])


def in_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Store a small gpt-oss' experts as published ones are; what each tensor of theirs is worth, by transformers."""
    torch.manual_seed(4)
    tensors, worth = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, in_, out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, in_ // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, out, in_ // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        worth[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(
        folder,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]},
    )
    return worth


@pytest.mark.parametrize("stored", ["mxfp4", "bf16"])
def test_experts_in_one_tensor_are_taken_apart(
    stored: str, copied: Make, samples: Samples, loss_of: Loss, tmp_path: Path
) -> None:
    """Each expert has the NF4 bytes of its own matrix; unquantized, the model is transformers' of the same weights."""
    folder = copied("gpt_oss", "bfloat16" if stored == "bf16" else "float32", **LIVELY)
    plain = shutil.copytree(folder, tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    if stored == "mxfp4":
        worth = in_mxfp4(folder)
        save_file({**tensors, **worth}, plain / "model.safetensors", {"format": "pt"})
    else:
        worth = {
            n: t for n, t in tensors.items() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))
        }
    model = load_model(folder, DOUBLE, torch.float32)

    assert len(worth) == 2 * 2
    for name, together in worth.items():
        prefix, _, leaf = name.removeprefix("model.").rpartition(".")
        for number, matrix in enumerate(together):
            layer: Any = model.graph.get_submodule(f"{prefix}.{number}.{leaf}")
            expected = quantize_nf4(matrix.t(), double=True, name=name)
            assert torch.equal(layer.weight.matrix.packed, expected.packed)
            assert torch.equal(layer.bias, tensors[f"{name}_bias"][number].float())
    stock = by_transformers(plain, samples)
    for scheme in (Unquantized(), AsStored()):
        assert float(loss_of(load_model(folder, scheme, torch.float32))) == pytest.approx(stock, rel=1e-6)


def test_experts_of_different_numbers_are_refused(copied: Make) -> None:
    """Scales of fewer experts than codes, and fewer experts than config.json says."""
    folder = copied("gpt_oss", **LIVELY)
    in_mxfp4(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:3].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(
        ModelError, match=r"experts.down_proj is not of one number of experts: .*_scales \[3, 64, 3\]"
    ):
        load_model(folder, DOUBLE, torch.float32)
    tensors[f"{name}_blocks"] = tensors[f"{name}_blocks"][:3].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 of the model's tensors, such as .*experts.3.down_proj.weight"
    ):
        load_model(folder, DOUBLE, torch.float32)


def test_tied_head_is_the_embedding(small_model: Make) -> None:
    """A tied head takes no memory of its own."""
    model = load_model(small_model("llama", **WORDS), Unquantized(), torch.float32)
    embedding: Any = model.graph.get_submodule("embed_tokens")

    assert model.head.data_ptr() == embedding.weight.data_ptr()


def test_nothing_of_the_base_is_trained(small_model: Make) -> None:
    """No tensor of the base asks for a gradient, and none is left on the meta device."""
    model = load_model(small_model("qwen2", **WORDS), DOUBLE, torch.float32)
    tensors = [*model.graph.parameters(), *model.graph.buffers()]

    assert tensors
    assert not any(t.requires_grad for t in tensors)
    assert not any(t.is_meta for t in tensors)


def test_bf16_is_near_fp32(small_model: Make, loss_of: Loss) -> None:
    """Computed in bf16, the loss is that of fp32 to three digits."""
    folder = small_model("llama", "bfloat16", **LIVELY)

    found = float(loss_of(load_model(folder, DOUBLE, torch.bfloat16)))
    assert found == pytest.approx(float(loss_of(load_model(folder, DOUBLE, torch.float32))), rel=5e-3)


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
def test_other_layouts_of_the_same_checkpoint(
    change: Callable[[Path], Path], copied: Make, loss_of: Loss
) -> None:
    """Shards, a decoder's own names, and harmless extra tensors give the same model, bit for bit."""
    folder = copied("qwen3", **LIVELY)
    expected = loss_of(load_model(folder, DOUBLE, torch.float32))

    assert torch.equal(loss_of(load_model(change(folder), DOUBLE, torch.float32)), expected)


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() | WRAPPERS.keys()))
def test_shards_of_every_family(kind: str, copied: Make, loss_of: Loss) -> None:
    """Tensors that come in another order, from several files, make the same model, bit for bit."""
    folder = copied(kind, **LIVELY)
    expected = loss_of(load_model(folder, Unquantized(), torch.float32))

    assert torch.equal(loss_of(load_model(shard(folder), Unquantized(), torch.float32)), expected)


def as_in_the_class(tensors: Tensors) -> None:
    """Name a multimodal model's tensors as transformers' classes do; it saves them as the Hub has them."""
    for name in list(tensors):
        inner = name.removeprefix("language_model.")
        outer = f"model.language_model.{inner.removeprefix('model.')}" if inner != name else f"model.{name}"
        tensors[inner if inner == "lm_head.weight" else outer] = tensors.pop(name)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(WRAPPERS.keys() - {"qwen3_5"}))  # on the Hub as in the class
def test_either_naming_of_a_multimodal_model(
    kind: str, tied: bool, copied: Make, samples: Samples, loss_of: Loss
) -> None:
    """Named as on the Hub or as in the class, and then in shards, it is the same model, and the stock one."""
    folder = copied(kind, **LIVELY, tie_word_embeddings=tied)
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in load_file(folder / "model.safetensors")
    expected = loss_of(load_model(folder, DOUBLE, torch.float32))
    shard(rewrite(folder, as_in_the_class))

    assert torch.equal(loss_of(load_model(folder, DOUBLE, torch.float32)), expected)
    found = float(loss_of(load_model(folder, Unquantized(), torch.float32)))
    assert found == pytest.approx(by_transformers(folder, samples), rel=1e-6)


def test_a_tensor_that_no_part_of_a_multimodal_model_has(copied: Make) -> None:
    """What is neither the language model's nor of a part that is known to be left out is refused by name."""
    folder = rewrite(copied("gemma3"), lambda t: t.update({"model.audio_tower.weight": torch.zeros(2)}))

    with pytest.raises(ModelError, match=r"model\.audio_tower\.weight"):
        load_model(folder, Unquantized(), torch.float32)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_5"])
def test_layers_that_predict_further_tokens_are_passed_over(kind: str, copied: Make, loss_of: Loss) -> None:
    """Published checkpoints hold them beside the language model, which is the same without."""
    folder = copied(kind, **LIVELY)
    expected = loss_of(load_model(folder, Unquantized(), torch.float32))
    rewrite(folder, lambda tensors: tensors.update({"mtp.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}))

    assert torch.equal(loss_of(load_model(folder, Unquantized(), torch.float32)), expected)


def test_decays_are_made_of_fp32_whatever_is_computed_in(small_model: Make) -> None:
    """exp(A_log) of a rounded A_log would be another rate."""
    folder = small_model("qwen3_5_text", **LIVELY)
    stored = load_file(folder / "model.safetensors")
    model = load_model(folder, Unquantized(), torch.bfloat16)
    core: Any = model.graph.get_submodule("layers.0.linear_attn")

    assert torch.equal(core.core.rate, stored["model.layers.0.linear_attn.A_log"].exp())


MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
from transformers.models.llama import modeling_llama
from qlora_trainer.modeling.families import FAMILIES, WRAPPERS
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.quantization.nf4 import quantize_nf4
from qlora_trainer.quantization.schemes import Nf4, Unquantized

torch.set_num_threads(1)
scheme = Unquantized() if sys.argv[2] == "none" else Nf4(double=True)
quantize_nf4(torch.randn(64, 64), double=True, name="warm-up")

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
model = load_model(Path(sys.argv[1]), scheme, torch.float32)
done.set()
thread.join()
finished = sum({t.data_ptr(): t.nbytes for t in [model.head, *model.graph.parameters()]}.values())
finished += sum(layer.weight.nbytes for layer in model.linears.values())
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
    """Write an index of shards, in the place of the single file."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return write


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "linear missing": (
        lambda f: rewrite(f, lambda t: t.pop(Q_PROJ)),
        f"lacks 1 of the model's tensors, such as {Q_PROJ}",
    ),
    "norm missing": (
        lambda f: rewrite(f, lambda t: t.pop(NORM)),
        f"lacks 1 of the model's tensors, such as {NORM}",
    ),
    "embedding missing": (lambda f: rewrite(f, lambda t: t.pop(EMBEDDING)), EMBEDDING),
    "untied head missing": (lambda f: configure(f, tie_word_embeddings=False), "lm_head.weight"),
    "layer missing": (
        lambda f: configure(f, num_hidden_layers=3),
        r"lacks 9 of the model's tensors, such as model\.layers\.2",
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
    "cut in the data": (
        lambda f: cut(f / "model.safetensors", 100_000),
        "model.safetensors is not a complete",
    ),
    "cut in the header": (lambda f: cut(f / "model.safetensors", 100), "model.safetensors is not a complete"),
    "empty file": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors is not a complete"),
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


@pytest.mark.parametrize("scheme", [DOUBLE, Unquantized()], ids=["nf4-double", "none"])
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
        load_model(folder, Unquantized(), torch.float32)
