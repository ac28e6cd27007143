"""Each form of a small model's adapter, made, opened again and compared; and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exported import exported
from gguf_models import FIXED, TARGETS
from qlora_contract.export import EXPORT_FORMS, ExportForm, ExportRequest
from qlora_contract.job_folder import is_exported
from qlora_trainer.errors import ConfigurationError, Fenced, ModelError, StorageFull
from qlora_trainer.export import exporting, gguf, merged_weights, proof
from qlora_trainer.export.exporting import bytes_needed, check_forms, export

pytestmark = pytest.mark.process

SIZES = {"hidden_size": 256, "intermediate_size": 256}
"""Of which k-quants' blocks are made."""


class Told:
    """A Listener."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done = 0

    def begin(self, name: str, total: int) -> None:
        """Note it."""
        self.lines.append(name)

    def advance(self, done: int) -> None:
        """Count it."""
        self.done += done

    def exported(self, form: ExportForm) -> None:
        """Note it."""
        self.lines.append(form)


def a_request(model: Path, adapter: Path, output: Path, *forms: ExportForm) -> ExportRequest:
    """Of these forms; all of them by default."""
    return ExportRequest(
        name="mine",
        model=str(model),
        adapter=str(adapter),
        output=str(output),
        forms=list(forms or EXPORT_FORMS),
    )


def no_fence() -> None:
    """Nobody else has taken the folder."""


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_form_of_every_family_is_the_adapters_model(
    kind: str, small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Read back, each gives the adapter's logits up to the rounding of its type, and not the base's."""
    model, told = small_model(kind, **SIZES), Told()

    export(a_request(model, an_adapter(model), tmp_path / "out"), told, no_fence)

    reports = {
        form: json.loads((tmp_path / "out" / form / "export_report.json").read_text())
        for form in EXPORT_FORMS
    }
    proofs = {form: report["proof"] for form, report in reports.items()}
    base = proofs["merged"]["base_kl_divergence"]
    assert base > 1e-3
    assert proofs["merged"]["kl_divergence"] < 1e-6
    assert proofs["gguf-lora"]["kl_divergence"] < 1e-9
    assert proofs["gguf-f16"]["kl_divergence"] < 1e-5
    assert proofs["gguf-f16"]["kl_divergence"] < proofs["gguf-q8_0"]["kl_divergence"] < base / 10
    assert proofs["gguf-q8_0"]["kl_divergence"] < proofs["gguf-q4_k_m"]["kl_divergence"] < base
    assert all(proof["adapter_share"] == pytest.approx(1, abs=0.1) for proof in proofs.values())
    assert {"Q4_K", "Q6_K"} <= reports["gguf-q4_k_m"]["tensor_types"].keys()
    assert [line for line in told.lines if line in EXPORT_FORMS] == list(EXPORT_FORMS)
    assert told.done > 0
    assert not list((tmp_path / "out").glob(".*"))
    files = [path for path in (tmp_path / "out").glob("*/*") if path.is_file()]
    (tmp_path / "like any").touch()
    assert {path.stat().st_mode for path in files} == {(tmp_path / "like any").stat().st_mode}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "granitemoehybrid", "mistral3", "olmo3", "qwen3_5", "qwen3_moe"])
def test_what_gguf_keeps_otherwise_is_the_adapters_model(
    kind: str, small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Language models of multimodal ones, layers that are two there, experts that are one, heads in another order."""
    model = small_model(kind, **FIXED.get(kind, {}))
    adapter = an_adapter(model, targets=TARGETS.get(kind, "all-linear"))

    out = exported(model, adapter, tmp_path / "out", "gguf-f16", "gguf-lora")

    for form, most in (("gguf-f16", 1e-4), ("gguf-lora", 1e-8)):
        proof = json.loads((out / form / "export_report.json").read_text())["proof"]
        assert proof["kl_divergence"] < most
        assert proof["adapter_share"] == pytest.approx(1, abs=0.1)
        assert proof["base_kl_divergence"] > 1e-6  # Granite divides its logits


def test_layers_with_scales_of_their_own_keep_them(
    small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """The adapter's GGUF file has one alpha for all."""
    model = small_model(**SIZES)
    adapter = an_adapter(model, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3, "up_proj": 40})

    export(a_request(model, adapter, tmp_path / "out", "gguf-lora", "merged"), Told(), no_fence)

    for form in ("gguf-lora", "merged"):
        proof = json.loads((tmp_path / "out" / form / "export_report.json").read_text())["proof"]
        assert proof["kl_divergence"] < 1e-6


@pytest.mark.parametrize(("form", "name"), [("merged", "merged"), ("gguf-lora", "gguf")])
def test_nothing_is_exported_of_a_quantized_base(
    form: ExportForm, name: str, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Said before anything is trained."""
    model = Path(shutil.copytree(small_model(), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))

    with pytest.raises(
        ModelError, match=f"output.formats has {name}, but .* is stored in FP8.*: name the unquantized"
    ):
        check_forms([form], model)


def test_an_adapter_is_merged_into_no_other_base(
    small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Whose layers have the same names and shapes. Nothing of it stays."""
    model = small_model()
    request = a_request(model, an_adapter(model), tmp_path / "out", "merged")

    with pytest.raises(ModelError, match="are not those that the adapter was trained on"):
        export(request.model_copy(update={"weights_sha256": "ab" * 32}), Told(), no_fence)

    assert not list((tmp_path / "out").iterdir())


def test_what_is_no_export_is_never_replaced(
    small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """A folder that the user names may hold anything."""
    model, precious = small_model(), tmp_path / "out" / "merged" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")

    with pytest.raises(ConfigurationError, match="merged is no export of qlora's: name another folder"):
        export(a_request(model, an_adapter(model), tmp_path / "out", "merged"), Told(), no_fence)

    assert precious.read_text() == "mine"


@pytest.mark.parametrize(
    ("share", "rounding", "fails"),
    [(1.02, 0.1, False), (0.0, 1.0, True), (0.02, 1.1, True), (-1.0, 2.1, False), (1.75, 3.0, False)],
    ids=["right", "no effect", "no effect, rounded", "a weak adapter", "weaker than rounding"],
)
def test_an_effect_that_rounding_hides_proves_nothing(share: float, rounding: float, fails: bool) -> None:
    """Neither that it is there nor that it is not."""
    found = proof.Comparison(
        tokens=9, kl_divergence=1e-3, greedy_agreement=1.0, adapter_share=share, rounding=rounding,
        base_kl_divergence=1e-3,
    )  # fmt: skip
    if fails:
        with pytest.raises(ModelError, match="of the adapter's effect is in it"):
            proof.check("gguf-q8_0", found)
    else:
        proof.check("gguf-q8_0", found)


def test_what_is_there_already_is_not_made_again(
    small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Unless it is of another adapter, or not complete."""
    model = small_model()
    first, second, output = an_adapter(model), an_adapter(model, scale=2.0), tmp_path / "out"
    made, again, other = Told(), Told(), Told()

    export(a_request(model, first, output, "merged"), made, no_fence)
    export(a_request(model, first, output, "merged"), again, no_fence)
    export(a_request(model, second, output, "merged"), other, no_fence)

    assert (made.lines[-1], again.lines, other.lines[-1]) == ("merged", [], "merged")
    (output / "merged" / "config.json").write_text("{}")
    manifest = json.loads((output / "merged" / "manifest.json").read_text())
    assert not is_exported(output / "merged", manifest["adapter_sha256"])


@pytest.mark.parametrize("form", ["merged", "gguf-f16"])
def test_an_export_without_the_adapters_effect_fails(
    form: ExportForm,
    small_model: Callable[..., Path],
    an_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A merge that does nothing gives files that load and answer; they are not kept."""
    model = small_model()

    def do_nothing(tensor: merged_weights.StoredTensor) -> Any:
        with merged_weights.open_safetensors(tensor.file) as handle:
            return handle.get_tensor(tensor.name)

    monkeypatch.setattr(merged_weights.StoredTensor, "value", do_nothing)
    with pytest.raises(
        ModelError, match=rf"{form} was opened again, and 0% of the adapter's effect is in it"
    ):
        export(a_request(model, an_adapter(model), tmp_path / "out", form), Told(), no_fence)

    assert not list((tmp_path / "out").iterdir())


def test_a_file_of_wrong_numbers_fails(
    small_model: Callable[..., Path],
    an_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as one whose weights lost their scale on the way."""
    model = small_model()
    right = gguf.quantized

    def wrong(name: str, tensor: torch.Tensor, kind: Any) -> Any:
        return right(name, tensor * (100.0 if "token_embd" in name or "output" in name else 1.0), kind)

    monkeypatch.setattr(gguf, "quantized", wrong)
    with pytest.raises(ModelError, match="gguf-q8_0 was opened again, and"):
        export(a_request(model, an_adapter(model), tmp_path / "out", "gguf-q8_0"), Told(), no_fence)


def test_an_adapter_that_changes_nothing_is_refused(
    small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """As one that was never trained."""
    model = small_model()

    with pytest.raises(ModelError, match="the adapter changes nothing"):
        export(a_request(model, an_adapter(model, scale=0.0), tmp_path / "out", "merged"), Told(), no_fence)


def test_an_attempt_that_was_overtaken_publishes_nothing(
    small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """The form gets its name only while the folder is ours."""
    model = small_model()

    def overtaken() -> None:
        raise Fenced("attempt 2 has taken over")

    with pytest.raises(Fenced):
        export(a_request(model, an_adapter(model), tmp_path / "out", "merged"), Told(), overtaken)

    assert not list((tmp_path / "out").iterdir())


def test_too_little_space_is_seen_before_anything_is_written(
    small_model: Callable[..., Path],
    an_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the names of the forms, and what they need."""
    model, told = small_model(), Told()
    monkeypatch.setattr(
        exporting.shutil, "disk_usage", lambda _: exporting.shutil._ntuple_diskusage(10, 5, 5)
    )

    with pytest.raises(StorageFull, match="5 bytes free; merged, gguf-q8_0 need"):
        export(a_request(model, an_adapter(model), tmp_path / "out", "merged", "gguf-q8_0"), told, no_fence)

    assert told.lines == []


@pytest.mark.parametrize(("form", "size"), [("merged", "5m"), ("gguf-f16", "5m"), ("gguf-lora", "16k")])
def test_a_disk_that_fills_up_meanwhile_is_said(
    form: ExportForm,
    size: str,
    small_model: Callable[..., Path],
    an_adapter: Callable[..., Path],
    make_disk: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By others, after there was room. Nothing of the form stays."""
    model = small_model()
    adapter = Path(shutil.move(an_adapter(model), tmp_path_factory.mktemp("elsewhere")))
    output = make_disk(size) / "out"
    monkeypatch.setattr(
        exporting.shutil, "disk_usage", lambda _: exporting.shutil._ntuple_diskusage(9**15, 0, 9**15)
    )

    with pytest.raises(StorageFull, match=f"no space left while writing .*{form}"):
        export(a_request(model, adapter, output, form), Told(), no_fence)

    assert not list(output.iterdir())


def test_forms_are_checked_before_anything_is_trained(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A tokenizer that llama.cpp has no name for would be found out after hours."""
    model = Path(shutil.copytree(small_model(), tmp_path / "model"))
    check_forms(EXPORT_FORMS, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["use_regex"] = False
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))

    with pytest.raises(ModelError, match=r"output\.formats has gguf, but the tokenizer splits texts"):
        check_forms(["gguf-q8_0"], model)
    check_forms(["merged"], model)
    assert bytes_needed(["merged"], model) > (model / "model.safetensors").stat().st_size
