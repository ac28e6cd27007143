"""Models stored in GGUF files."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_folders import by_transformers
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.families import read_config
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.stored import gguf as stored_gguf
from qlora_trainer.modeling.stored.formats import description
from qlora_trainer.modeling.weight_files import WeightsHash, bytes_per_weight, fingerprint, weight_files
from qlora_trainer.quantization.nf4 import quantize_nf4
from qlora_trainer.quantization.schemes import Nf4, Unquantized

pytestmark = pytest.mark.process
gguf = pytest.importorskip("gguf")

Make = Callable[..., Path]
Loss = Callable[..., Tensor]
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
BACK = {new: old for old, new in stored_gguf.NAMES.items()}


def gguf_name(name: str) -> str:
    """transformers' name -> llama.cpp's."""
    path, _, leaf = name.rpartition(".")
    if path.startswith("model.layers."):
        _, _, layer, inner = path.split(".", 3)
        return f"blk.{layer}.{BACK[inner]}.{leaf}"
    return f"{BACK[path]}.{leaf}"


def write(folder: Path, kind: str, quant: str, **metadata: Any) -> dict[str, Tensor]:
    """Put a GGUF file in the place of a folder's safetensors and config.json, as llama.cpp's converter would; what its
    weights are worth, by transformers' names."""
    config = read_config(folder)
    tensors, worth = load_file(folder / "model.safetensors"), {}
    writer = gguf.GGUFWriter(folder / "model.gguf", kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in metadata.items():
        writer.add_string(f"{kind}.{key.replace('_', '.')}", value)
    quantized = gguf.GGMLQuantizationType[quant]
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        of = name.split(".")[-2]
        if kind == "llama" and of in heads:
            halves = array.reshape(heads[of], 2, -1, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        if array.ndim == 2:
            data = gguf.quantize(array, quantized)
            back = torch.from_numpy(gguf.dequantize(data, quantized))
            writer.add_tensor(gguf_name(name), data, raw_dtype=quantized)
        else:
            back = torch.from_numpy(array)
            writer.add_tensor(gguf_name(name), array)
        if kind == "llama" and of in heads:
            back = back.view(heads[of], -1, 2, *back.shape[1:]).transpose(1, 2).reshape(back.shape)
        worth[name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "model.safetensors").unlink()
    return worth


@pytest.mark.parametrize("quant", ["Q4_1", "Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_is_the_model_of_its_dequantized_weights(
    kind: str, quant: str, copied: Make, tmp_path: Path, samples: Samples, loss_of: Loss
) -> None:
    """Without config.json the file tells all; its weights are those that gguf's own code makes of it."""
    # transformers takes every Qwen3 to have heads of 128, as the published ones have.
    folder = copied(kind, **LIVELY, **({"head_dim": 128} if kind == "qwen3" else {}))
    shutil.copytree(folder, tmp_path / "plain")
    worth = write(folder, kind, quant)
    (folder / "config.json").unlink()
    save_file(worth, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    taken = WeightsHash(1)
    model: Any = load_model(folder, Nf4(double=True), torch.float32, weights_hash=taken)

    for path, layer in model.linears.items():
        expected: Any = quantize_nf4(worth[f"{path}.weight"], double=True, name=path)
        assert torch.equal(layer.weight.matrix.packed, expected.packed), path
        assert torch.equal(layer.weight.matrix.scales.codes, expected.scales.codes), path
    assert taken.hexdigest()
    assert float(loss_of(load_model(folder, Unquantized(), torch.float32))) == pytest.approx(
        by_transformers(tmp_path / "plain", samples), rel=1e-6
    )
    assert description(folder, read_config(folder)) == f"GGUF, {quant}"
    assert bytes_per_weight(folder) == (2 if quant in ("F16", "BF16") else 4)
    assert weight_files(folder) == [folder / "model.gguf"]
    assert len(fingerprint(folder)) == 64


def test_scaled_rotary_embeddings_need_the_original_configuration(copied: Make) -> None:
    """llama.cpp's files do not tell how they are scaled; with config.json beside the file they need not."""
    folder = copied("llama", **LIVELY)
    write(folder, "llama", "Q8_0", rope_scaling_type="linear")
    read_config(folder)
    (folder / "config.json").unlink()

    with pytest.raises(ModelError, match=r"scaled rotary embeddings.*put the config\.json"):
        read_config(folder)


def test_other_architectures_are_refused_by_name(copied: Make) -> None:
    """What is not in the table may have its rows in an order of its own."""
    folder = copied("llama", **LIVELY)
    write(folder, "gemma2", "Q8_0")

    with pytest.raises(ModelError, match="has a GGUF file of a 'gemma2' model; supported are llama"):
        read_config(folder)


def test_one_of_several_files_must_be_chosen(copied: Make) -> None:
    """A folder with two quantizations of a model does not say which is meant; safetensors go before both."""
    folder = copied("llama", **LIVELY)
    shutil.copy(folder / "model.safetensors", folder / "kept")
    write(folder, "llama", "Q8_0")
    shutil.copy(folder / "model.gguf", folder / "other.gguf")

    with pytest.raises(ModelError, match=r"2 GGUF files, such as model\.gguf and other\.gguf: leave the one"):
        weight_files(folder)
    (folder / "kept").rename(folder / "model.safetensors")
    assert weight_files(folder) == [folder / "model.safetensors"]


HEADER = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
"""No tensor, and one field."""
ENDLESS = struct.pack("<QcIIQ", 1, b"a", 9, 8, 2**60)
"""A field named a: an array of 2^60 strings."""


@pytest.mark.parametrize("content", [b"GGUF" + bytes(40), HEADER + ENDLESS], ids=["zeros", "without end"])
def test_a_damaged_file_is_refused(content: bytes, copied: Make) -> None:
    """What is no GGUF file is a ModelError that names it."""
    folder = copied("llama", **LIVELY)
    (folder / "model.safetensors").unlink()
    (folder / "broken.gguf").write_bytes(content)

    with pytest.raises(ModelError, match=r"broken\.gguf is not a complete GGUF file"):
        read_config(folder)
