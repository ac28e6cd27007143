"""The finished adapter: PEFT's format, a model card, a report, a loss curve.

It is written to a staging folder, reloaded from there and evaluated by the caller, and only then published.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from qlora_contract.files import sha256
from qlora_contract.job_folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHAT_TEMPLATE,
    LOSS_CURVE,
    TRAINING_REPORT,
)
from qlora_contract.remote import is_remote, parse_remote
from qlora_contract.run_config import RunConfig
from qlora_contract.units import first_line
from qlora_trainer.artifacts.tensors import save_tensors
from qlora_trainer.errors import TrainerError
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.adapter_parameters import AdapterParameters
from qlora_trainer.storage.atomic import replace_folder, seal_folder, translate_os_errors, write_atomically
from qlora_trainer.storage.job_folder import JobFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

USE = """\
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

base = {auto}.from_pretrained({base}{revision}, dtype="auto")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")

{prompt}
answer = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
PROMPTS = {
    True: """\
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)""",
    False: """\
inputs = tokenizer("...", return_tensors="pt")""",
}
"""How to ask, by whether the data were conversations, which a chat template wrote."""


_IDS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0
grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0
other pddl postgresql unknown unlicense wtfpl zlib
"""
HUB_LICENSES = frozenset(_IDS.split())
"""What the Hub takes as `license` of a card. Another license is `other`, with its name as `license_name`."""

FEW_POINTS = 60
"""A curve of fewer steps shows each as a dot: a line of one point cannot be seen."""


def staging_folder(folder: JobFolder) -> Path:
    """Where this attempt's adapter is until it is published."""
    return folder.path / f".{ADAPTER}.{folder.run.job.uid}-{folder.run.job.attempt}.tmp"


def write_adapter(
    folder: JobFolder,
    parameters: AdapterParameters,
    base: str | None,
    chat_template: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Path:
    """Write weights and configuration as PEFT does, into the staging folder, and return that.

    Args:
        folder: the job's.
        parameters: the adapter, named by its method.
        base: the value of `base_model_name_or_path`; None where stock tools could not find it by a name.
        chat_template: what the conversations were written with, which prompts must be written with, too.
        tokenizer: the model's, which tools look for beside an adapter.

    Raises:
        StorageFull: they do not fit.
    """
    staged = staging_folder(folder)
    shutil.rmtree(staged, ignore_errors=True)
    with translate_os_errors(f"writing the adapter to {folder.path}"):
        staged.mkdir(parents=True)
        write_peft(staged, folder.run, parameters, base)
        if tokenizer is not None:
            write_tokenizer(tokenizer, staged)
            # The template beside an adapter is that of its data, and not one that the model happens to have.
            (staged / CHAT_TEMPLATE).unlink(missing_ok=True)
        if chat_template is not None:
            (staged / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    return staged


def write_peft(into: Path, run: RunConfig, parameters: AdapterParameters, base: str | None) -> None:
    """Write the two files that make a folder an adapter for PEFT. Raises OSError.

    Args:
        into: the folder.
        run: the job.
        parameters: the adapter, named by its method.
        base: as for write_adapter.
    """
    save_tensors(parameters.published(), into / ADAPTER_WEIGHTS, {"format": "pt"})
    (into / ADAPTER_CONFIG).write_text(json.dumps(adapter_config(run, parameters, base), indent=2))


def write_tokenizer(tokenizer: "PreTrainedTokenizerBase", staged: Path) -> None:
    """Write the files of a tokenizer. One that cannot be written costs nobody the adapter: the base has it, too."""
    try:
        tokenizer.save_pretrained(staged)
    except OSError:
        raise  # the disk's: it would fail the other files as well
    except Exception as error:  # of whatever class the tokenizer is
        log.warning("the tokenizer is not written beside the adapter: %s", first_line(error))


def adapter_config(run: RunConfig, parameters: AdapterParameters, base: str | None) -> dict[str, Any]:
    """adapter_config.json. Written by hand: importing peft imports every quantizer that is installed."""
    return {
        **method_for(run.adapter).peft_config(parameters),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": run.fetched.model if run.model.source.startswith("hf://") else None,
        "inference_mode": True,
    }


def base_model(run: RunConfig) -> str | None:
    """The model that the adapter names as its base: `org/name` for one of the Hub, else None.

    A path means nothing elsewhere, and the Hub refuses a card with one.
    """
    if not is_remote(run.model.source):
        return None
    remote = parse_remote(run.model.source)
    return remote.root if remote.kind == "model" else None


def reload_adapter(staged: Path, parameters: AdapterParameters) -> None:
    """Replace the trained weights by the written ones: what is evaluated next is what was written.

    Raises:
        TrainerError: the file does not hold exactly the adapter's tensors.
    """
    written, expected = load_file(staged / ADAPTER_WEIGHTS), parameters.published()
    if {name: t.shape for name, t in written.items()} != {name: t.shape for name, t in expected.items()}:
        raise TrainerError(f"{staged} does not hold the tensors that were written to it")
    parameters.load_published(written)


def publish(folder: JobFolder, staged: Path, report: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
    """Complete the staged adapter with card, report and curve, and make it the job's adapter.

    Args:
        folder: the job's.
        staged: what write_adapter returned.
        report: training_report.json.
        metrics: the lines of metrics.jsonl.

    Raises:
        Fenced: a newer attempt has taken over; its adapter stays.
        StorageFull: the files do not fit; the job is not finished.
    """
    text = json.dumps(report, indent=1)
    with translate_os_errors(f"publishing the adapter to {folder.adapter}"):
        chat = (staged / CHAT_TEMPLATE).is_file()
        (staged / "README.md").write_text(model_card(folder.run, report, chat=chat), encoding="utf-8")
        (staged / TRAINING_REPORT).write_text(text)
        loss_curve(metrics, report, staged / LOSS_CURVE)
        seal_folder(staged, {"sha256": sha256(staged / ADAPTER_WEIGHTS)})
        folder.check_fence()
        replace_folder(staged, folder.adapter)
        shutil.copyfile(folder.adapter / LOSS_CURVE, folder.path / LOSS_CURVE)
    # The last file, since the job counts as done from here on.
    write_atomically(folder.path / TRAINING_REPORT, text)


def discard(folder: JobFolder) -> None:
    """Remove a staged adapter that will not be published."""
    shutil.rmtree(staging_folder(folder), ignore_errors=True)


def model_card(run: RunConfig, report: dict[str, Any], *, chat: bool = False) -> str:
    """README.md of the adapter, with the metadata that model hubs read.

    Args:
        run: the job.
        report: training_report.json.
        chat: whether a chat template wrote the data.
    """
    provenance = report["provenance"]
    base, license_ = provenance["base_model"], provenance.get("license")
    front = f"base_model: {json.dumps(base)}\n" if base else ""
    if license_ in HUB_LICENSES:
        front += f"license: {json.dumps(license_)}\n"
    elif license_:
        front += f"license: other\nlicense_name: {json.dumps(license_)}\n"
    datasets = hub_datasets(run)
    if datasets:
        front += f"datasets: {json.dumps(datasets)}\n"
    named = f"`{base}`" if base else "the model that training_report.json describes"
    revision = f" at {run.fetched.model}" if run.fetched.model else ""
    rows = [
        ("Base, as trained on", report["base_eval_loss_quantized"]),
        ("With this adapter", report["eval_loss"]),
        ("Base, unquantized", report["base_eval_loss"]),
        ("Base, unquantized, with this adapter: what most servers run", report.get("eval_loss_unquantized")),
    ]
    table = "\n".join(f"| {name} | {'not measured' if v is None else f'{v:.4f}'} |" for name, v in rows)
    adapter, training = run.adapter, run.training
    use = USE.format(
        auto=provenance.get("auto_class") or "AutoModelForCausalLM",
        base=json.dumps(base or "path/to/the/base/model"),
        revision=f", revision={json.dumps(run.fetched.model)}" if base and run.fetched.model else "",
        prompt=PROMPTS[chat],
    )
    terms = f"`{license_}`, as the base model's card has it" if license_ else "not stated"
    if adapter.method == "lora":
        kind, tags = "LoRA", "[lora, qlora, cpu]"
        settings = (
            f"- adapter: rank {adapter.rank}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g},\n"
            f"  on {', '.join(adapter.target_modules)}"
        )
        if adapter.rank_pattern or adapter.alpha_pattern:
            settings += (
                "\n- ranks and alphas of their own in some layers: vLLM before 0.32 does not read rank_pattern and\n"
                "  alpha_pattern, and scales these layers wrongly without a word; give it the merged model"
            )
    else:
        kind, tags = adapter.method, f"[{adapter.method}, cpu]"
        settings = f"- adapter: {adapter.virtual_tokens} virtual tokens before each prompt"
    return f"""---
{front}library_name: peft
pipeline_tag: text-generation
tags: {tags}
---

# {run.job.name}

A {kind} adapter for {named}{revision}, trained on CPUs by qlora-operator.

| Evaluation loss | |
| --- | --- |
{table}

{settings}
- base weights: {run.quantization.scheme}, computed in {report["compute_dtype"]}
- {report["steps"]} steps of at most {training.global_batch_tokens} tokens, {report["tokens"]} tokens in all,
  learning rate {training.learning_rate:g} ({training.schedule}), seed {training.seed}
- data: {data_line(datasets, report)}
- license: {terms}; those of the base model and of the data apply

```python
{use}```
"""


def hub_datasets(run: RunConfig) -> list[str]:
    """The data sets' names on the Hub, without data from elsewhere, whose path means nothing to others."""
    remotes = [parse_remote(each.source) for each in run.dataset.all_sources if is_remote(each.source)]
    return list(dict.fromkeys(remote.root for remote in remotes if remote.kind == "dataset"))


def data_line(datasets: list[str], report: dict[str, Any]) -> str:
    """What it was trained on, in a line."""
    provenance, facts = report["provenance"], report.get("data", {}).get("training", {})
    parts = [", ".join(f"`{name}`" for name in datasets) or "private"]
    if revision := provenance.get("dataset_revision"):
        parts.append(f"revision {revision}")
    if records := facts.get("records"):
        parts.append(f"{records:,} records")
    if digest := provenance.get("dataset_sha256"):
        parts.append(f"sha256 {digest[:12]}")
    return ", ".join(parts)


def loss_curve(metrics: list[dict[str, Any]], report: dict[str, Any], path: Path) -> None:
    """Draw training and evaluation loss over the steps as a PNG. `metrics`: the lines of metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    trained = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    evaluated = [(m["step"], m["eval_loss"]) for m in metrics if m.get("eval_loss") is not None]
    dots = "o" if len(trained) < FEW_POINTS else ""
    axes.plot(*zip(*trained, strict=True), f"{dots}-", label="training", linewidth=1.2, markersize=3)
    if evaluated:
        # Points: nobody knows the loss between them.
        axes.plot(*zip(*evaluated, strict=True), "D", label="evaluation", markersize=6)
    if report["base_eval_loss"] is not None:
        axes.axhline(
            report["base_eval_loss"], linestyle="--", color="gray", label="evaluation, unquantized base"
        )
    axes.set(xlabel="step", ylabel="loss per supervised token", title=path.parent.parent.name)
    axes.grid(alpha=0.3)
    # Beside the axes, where it covers no line.
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
