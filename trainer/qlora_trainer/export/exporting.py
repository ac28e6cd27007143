"""Makes of an adapter what is served: each form in a folder of its own, which gets its name once it is proven."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qlora_contract.export import ExportForm, ExportRequest, gguf_type
from qlora_contract.files import sha256
from qlora_contract.job_folder import ADAPTER_WEIGHTS, EXPORT_REPORT, is_exported
from qlora_contract.run_config import GgufType
from qlora_contract.units import format_bytes, now
from qlora_trainer.errors import ConfigurationError, ModelError, StorageFull
from qlora_trainer.export import gguf, merged, proof
from qlora_trainer.export.adapter_weights import AdapterWeights, read_adapter
from qlora_trainer.export.chat_format import chat_format, without_generation_marks
from qlora_trainer.export.gguf_names import family_of
from qlora_trainer.export.merged_weights import StoredTensor, plan_tensors
from qlora_trainer.export.modelfile import generation_settings, modelfile, stop_texts
from qlora_trainer.export.proof import Comparison, Proof
from qlora_trainer.export.vocabulary import read_vocabulary
from qlora_trainer.modeling.families import read_config, read_model, read_tokenizer
from qlora_trainer.modeling.stored.formats import description, is_quantized
from qlora_trainer.modeling.weight_files import fingerprint, weight_files
from qlora_trainer.storage.atomic import make_folder, replace_folder, seal_folder, translate_os_errors

MARGIN_BYTES = 64 << 20
"""Space beyond the weights: tokenizer and reports."""


class Listener(Protocol):
    """Whoever is told of the progress. What it raises ends the export; nothing is left of it."""

    def begin(self, name: str, total: int) -> None:
        """Something of so many bytes is begun."""

    def advance(self, done: int) -> None:
        """So many more bytes of it are done."""

    def exported(self, form: ExportForm) -> None:
        """A form is finished."""


def check_forms(forms: Sequence[ExportForm], model: Path) -> None:
    """Raise ModelError, before anything is trained, when a model cannot take one of the forms."""
    if not forms:
        return
    config = read_config(model)
    if is_quantized(model, config):
        raise ModelError(
            f"output.formats has {forms[0].partition('-')[0]}, but {model} is stored in {description(model, config)}: "
            "name the unquantized model as model.source, or be content with the adapter, which is loaded beside it"
        )
    if not any(gguf_type(form) for form in forms):
        return
    try:
        family_of(config)
        read_vocabulary(read_tokenizer(model), config.vocab_size)
    except ModelError as error:
        raise ModelError(f"output.formats has gguf, but {error}") from error


def bytes_needed(forms: Sequence[ExportForm], model: Path) -> int:
    """About how many bytes the forms of a model take, before there is an adapter."""
    stored = sum(file.stat().st_size for file in weight_files(model))
    # Of 16 bits, or of 32: the larger estimate does no harm.
    share = {"merged": 1.0, "gguf-f16": 1.0, "gguf-q8_0": 0.55, "gguf-q4_k_m": 0.4, "gguf-lora": 0.05}
    return sum(int(share[form] * stored) + MARGIN_BYTES for form in forms)


def export(request: ExportRequest, listener: Listener, check_fence: Callable[[], None]) -> None:
    """Make the forms that are not there yet.

    Args:
        request: what to make of what.
        listener: is told of the progress.
        check_fence: raises Fenced once another attempt owns the job's folder.

    Raises:
        ModelError: the adapter does not belong to the model; a form is not possible, or not the adapter's model.
        StorageFull: it does not fit.
    """
    output, adapter = Path(request.output), Path(request.adapter)
    with translate_os_errors(f"reading {adapter}"):
        digest = sha256(adapter / ADAPTER_WEIGHTS)
    forms = [form for form in request.forms if not is_exported(output / form, digest)]
    if not forms:
        return
    for form in forms:
        check_place(output / form)
    exporter = _Exporter(request, digest, listener)
    make_folder(output)
    exporter.check_space(forms)
    for form in forms:
        staged = output / f".{form}.tmp"
        shutil.rmtree(staged, ignore_errors=True)
        make_folder(staged)
        try:
            with translate_os_errors(f"writing {output / form}"):
                exporter.make(form, staged)
                listener.begin(f"storing {form}", 0)
                seal_folder(staged, {"adapter_sha256": digest})
                check_fence()
                replace_folder(staged, output / form)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        listener.exported(form)


def check_place(target: Path) -> None:
    """Raise ConfigurationError where something stands that is no export: it would be replaced."""
    with translate_os_errors(f"reading {target}"):
        taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
        if taken and not (target / EXPORT_REPORT).is_file():
            raise ConfigurationError(
                f"{target} is no export of qlora's: name another folder, or move away what is there"
            )


@dataclass(frozen=True)
class _Made:
    """A form in its staging folder."""

    facts: dict[str, Any]
    """For its report."""
    comparison: Comparison


class _Exporter:
    """What all forms are made of.

    Raises:
        ModelError: model or adapter cannot be used, or do not belong together.
    """

    def __init__(self, request: ExportRequest, digest: str, listener: Listener) -> None:
        self.name, self.digest, self.listener = request.name, digest, listener
        self.weights_sha256 = request.weights_sha256
        self.output = Path(request.output)
        self.model = Path(request.model)
        family, self.config = read_model(self.model)
        self.adapter: AdapterWeights = read_adapter(Path(request.adapter))
        self.tensors: list[StoredTensor] = plan_tensors(self.model, family, self.adapter)
        self.tokenizer = read_tokenizer(self.model)
        template = self.adapter.chat_template or getattr(self.tokenizer, "chat_template", None)
        self.chat_template = without_generation_marks(template) if isinstance(template, str) else None
        self._proof: Proof | None = None

    @property
    def proof(self) -> Proof:
        """The adapter's model, to compare with; made once."""
        if self._proof is None:
            self.listener.begin("computing what the adapter's model says", 0)
            self._proof = Proof(self.model, self.adapter, self.tokenizer, self.weights_sha256)
        return self._proof

    def check_space(self, forms: Sequence[ExportForm]) -> None:
        """Raise StorageFull unless all forms fit beside what is there."""
        needed = sum(self._nbytes(form) + MARGIN_BYTES for form in forms)
        free = shutil.disk_usage(self.output).free
        if free < needed:
            raise StorageFull(
                f"{self.output} has {format_bytes(free)} free; {', '.join(forms)} need {format_bytes(needed)}"
            )

    def _nbytes(self, form: ExportForm) -> int:
        kind = gguf_type(form)
        if kind is None:
            return sum(tensor.nbytes for tensor in self.tensors)
        if kind == "lora":
            return sum(added.a.nbytes + added.b.nbytes for added in self.adapter.layers.values())
        return sum(tensor.nbytes for tensor in gguf.plan_model(self.tensors, self.config, kind))

    def make(self, form: ExportForm, staged: Path) -> None:
        """Write a form into its staging folder, prove it and report on it."""
        kind = gguf_type(form)
        made = self._merged(staged) if kind is None else self._gguf(staged, kind)
        proof.check(form, made.comparison)
        report = {
            "form": form,
            "adapter_sha256": self.digest,
            "base_fingerprint": fingerprint(self.model),
            "bytes": sum(path.stat().st_size for path in staged.iterdir()),
            **made.facts,
            "proof": made.comparison.report(),
            "finished": now(),
        }
        (staged / EXPORT_REPORT).write_text(json.dumps(report, indent=1))

    def _merged(self, staged: Path) -> _Made:
        self.listener.begin("merging", sum(tensor.nbytes for tensor in self.tensors))
        merged.write_merged(staged, self.model, self.tensors, self.chat_template, self.listener.advance)
        expected = self.proof
        self.listener.begin("comparing merged", 0)
        return _Made({"merged_layers": len(self.adapter.layers)}, expected.of_folder(staged))

    def _gguf(self, staged: Path, kind: GgufType) -> _Made:
        file = staged / f"{self.name}-{kind}.gguf"
        if kind == "lora":
            gguf.write_lora(file, self.adapter, self.config, self.name)
            return _Made({"file": file.name}, self.proof.of_lora(file, self.adapter, self.config))
        planned = gguf.plan_model(self.tensors, self.config, kind)
        self.listener.begin(f"writing GGUF {kind}", sum(tensor.nbytes for tensor in self.tensors))
        vocabulary = read_vocabulary(self.tokenizer, self.config.vocab_size)
        chat = None if self.chat_template is None else chat_format(self.tokenizer, self.chat_template)
        generation = generation_settings(self.model)
        stops = _stop_ids(self.config, generation, self.tokenizer)
        texts = stop_texts(self.tokenizer, chat, stops)
        metadata = gguf.Metadata(
            self.name,
            self.config,
            kind,
            vocabulary,
            self.chat_template,
            _special(self.tokenizer, stops, texts),
        )
        types = gguf.write_model(file, planned, metadata, self.listener.advance)
        bos = self.tokenizer.bos_token if vocabulary.add_bos else None
        (staged / "Modelfile").write_text(
            modelfile(file.name, chat, bos, texts, generation), encoding="utf-8"
        )
        expected = self.proof
        self.listener.begin(f"comparing GGUF {kind}", 0)
        facts = {
            "file": file.name,
            "tensor_types": dict(types),
            "context_length": gguf.context_length(self.config),
        }
        return _Made(facts, expected.of_gguf(file, self.tensors, self.config))


def _stop_ids(config: Any, generation: dict[str, Any], tokenizer: Any) -> list[int]:
    """The tokens at which the model stops: its tokenizer's, then those of its generation."""
    found = [tokenizer.eos_token_id]
    for ids in (generation.get("eos_token_id"), config.eos_token_id):
        found += ids if isinstance(ids, list) else [ids]
    return list(dict.fromkeys(id_ for id_ in found if id_ is not None))


def _special(tokenizer: Any, stops: Sequence[int], texts: Sequence[str]) -> dict[str, int]:
    """GGUF's roles of tokens. What ends a turn is its own role where the tokenizer's end of text is another."""
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    ends = [*(tokenizer.convert_tokens_to_ids(text) for text in texts), *stops]
    found["eot"] = next((id_ for id_ in ends if id_ != tokenizer.eos_token_id), None)
    return {role: id_ for role, id_ in found.items() if id_ is not None}
