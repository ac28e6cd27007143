"""The published adapter: what stock tools make of it, and that it is whole or not there."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from builders import a_run
from crashes import CRASH_AT
from qlora_contract.files import sha256
from qlora_contract.job_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHAT_TEMPLATE,
    FENCE,
    LOSS_CURVE,
    MANIFEST,
    TRAINING_REPORT,
    read_manifest,
)
from qlora_contract.run_config import JobRef
from qlora_trainer.artifacts import adapter
from qlora_trainer.errors import Fenced, StorageFull, TrainerError
from qlora_trainer.modeling.adapter_parameters import PEFT_PREFIX, AdapterParameters, flat_parameters
from qlora_trainer.modeling.lora import attach_adapters
from qlora_trainer.modeling.lora_linear import LoraLinear
from qlora_trainer.quantization.frozen_weight import UnquantizedWeight
from qlora_trainer.run_file import load_run
from qlora_trainer.storage.job_folder import JobFolder
from testcluster.hub import card_errors

pytestmark = pytest.mark.process

REPORT: dict[str, Any] = {
    "base_eval_loss": 2.5,
    "base_eval_loss_quantized": 2.75,
    "eval_loss": 1.25,
    "steps": 2,
    "tokens": 2048,
    "compute_dtype": "fp32",
    "provenance": {"base_model": "/volumes/data/model"},
}
STEPS: list[dict[str, Any]] = [
    {"step": 0, "loss": None, "eval_loss": 2.75},
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 1.5, "eval_loss": 1.25},
]


RELEASE = Path(__file__).parents[2] / "releases" / "0.1.0" / "checkpoint"


def acquired(path: Path, attempt: int = 0, **changes: Any) -> JobFolder:
    """A job's folder as an attempt has it after its start."""
    fields = {"job": {"attempt": attempt}, "adapter": {"rank": 2, "alpha": 4.0}, **changes}
    folder = JobFolder(path, a_run(**fields))
    folder.acquire()
    return folder


def small_adapter(fill: float | None = None) -> AdapterParameters:
    """Adapters of two layers of a decoder; all weights alike if `fill` says so."""
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    layers = {name: LoraLinear(name, UnquantizedWeight(torch.zeros(6, 4)), None) for name in names}
    parameters = attach_adapters(layers, rank=2, alpha=4.0, dropout=None, seed=0)
    if fill is not None:
        parameters.flat.data.fill_(fill)
    return parameters


def publish(folder: JobFolder, parameters: AdapterParameters, report: dict[str, Any] = REPORT) -> None:
    """Write and publish."""
    adapter.publish(folder, adapter.write_adapter(folder, parameters, "/volumes/data/model"), report, STEPS)


# --- the format


def test_peft_reads_the_configuration(tmp_path: Path) -> None:
    """Stock peft takes adapter_config.json, with the values of the job."""
    from peft import LoraConfig, PeftConfig

    staged = adapter.write_adapter(acquired(tmp_path), small_adapter(), "org/name")
    config = LoraConfig.from_pretrained(str(staged))

    assert isinstance(PeftConfig.from_pretrained(str(staged)), LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 4, 0.0)
    assert config.target_modules == {"q_proj", "up_proj"}
    assert config.base_model_name_or_path == "org/name"
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("source", "expected"), [("hf://org/name", "c0ffee"), ("s3://team/name", None)], ids=["hub", "s3"]
)
def test_a_model_of_the_hub_has_its_commit(tmp_path: Path, source: str, expected: str | None) -> None:
    """Stock peft loads that very revision; it could not load a bucket's hash."""
    folder = acquired(tmp_path, model={"source": source}, fetched={"model": "c0ffee"})
    config = adapter.adapter_config(folder.run, small_adapter(), "org/name")

    assert config["revision"] == expected
    report = {**REPORT, "provenance": {"base_model": "org/name"}}
    assert "for `org/name` at c0ffee, trained" in adapter.model_card(folder.run, report)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("pvc://data/model", None, id="claim"),
        pytest.param("hf://org/name", "org/name", id="hub"),
        pytest.param("s3://team/models/name", None, id="s3"),
    ],
)
def test_the_base_has_a_name_that_stock_tools_can_load(source: str, expected: str | None) -> None:
    """By its name on the Hub, from where stock tools fetch it; else none: a folder of a pod means nothing elsewhere."""
    assert adapter.base_model(a_run(model={"source": source})) == expected


def test_named_targets_stay_as_they_were_named(tmp_path: Path) -> None:
    """Whole paths are not shortened: peft would adapt more layers than were trained."""
    settings = {"rank": 2, "alpha": 4.0, "targetModules": ["layers.0.mlp.up_proj"]}
    folder = acquired(tmp_path, adapter=settings)
    config = adapter.adapter_config(folder.run, small_adapter(), "org/name")

    assert config["target_modules"] == ["layers.0.mlp.up_proj"]


def test_peft_computes_what_was_trained(tmp_path: Path, small_model: Any) -> None:
    """Stock peft on a stock model gives the logits of base plus scaled B A, computed by hand."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = small_model("llama")
    base = AutoModelForCausalLM.from_pretrained(folder)
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    weights = dict(base.named_parameters())
    layers = {
        name: LoraLinear(name, UnquantizedWeight(weights[f"{name}.weight"].data), None) for name in names
    }
    parameters = attach_adapters(layers, rank=2, alpha=4.0, dropout=None, seed=0)
    parameters.flat.data.normal_(generator=torch.Generator().manual_seed(1))
    staged = adapter.write_adapter(acquired(tmp_path), parameters, str(folder))
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(staged))(
            ids
        ).logits
        for name in names:
            a, b = (parameters.named[f"{name}.lora_{x}.weight"] for x in "AB")
            weights[f"{name}.weight"].data.add_(b @ a, alpha=4.0 / 2)
        ours = base(ids).logits

    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_what_is_reloaded_is_what_was_written(tmp_path: Path) -> None:
    """After the reload every parameter holds the file's numbers, whatever it held before."""
    parameters = small_adapter(0.5)
    staged = adapter.write_adapter(acquired(tmp_path), parameters, "org/name")
    parameters.flat.data.fill_(7.0)
    adapter.reload_adapter(staged, parameters)

    assert {float(w) for p in parameters.named.values() for w in p.data.flatten()} == {0.5}


def test_a_file_with_other_tensors_is_not_loaded(tmp_path: Path) -> None:
    """Weights of other layers are refused as a whole."""
    staged = adapter.write_adapter(acquired(tmp_path), small_adapter(0.5), "org/name")
    layer = LoraLinear("model.layers.0.mlp.down_proj", UnquantizedWeight(torch.zeros(6, 4)), None)
    other = attach_adapters({layer.name: layer}, rank=2, alpha=4.0, dropout=None, seed=0)

    with pytest.raises(TrainerError, match="does not hold the tensors that were written to it"):
        adapter.reload_adapter(staged, other)


# --- card, report, curve


@pytest.mark.parametrize("base", ["org/name", "org/yes", "1.0", None])
def test_the_model_card_s_metadata_is_yaml(tmp_path: Path, base: str | None) -> None:
    """Model hubs read the base's name, if it has one that they know."""
    card = adapter.model_card(acquired(tmp_path).run, {**REPORT, "provenance": {"base_model": base}})
    _, front, body = card.split("---\n", 2)

    assert yaml.safe_load(front) == {
        **({"base_model": base} if base else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "cpu"],
    }
    assert "\n# smollm2\n" in body
    assert "None" not in body


def test_the_model_card_says_what_was_measured(tmp_path: Path) -> None:
    """Losses to four digits; what was not measured says so."""
    card = adapter.model_card(acquired(tmp_path).run, {**REPORT, "base_eval_loss": None})

    assert "| Base, unquantized | not measured |" in card
    assert "| Base, as trained on | 2.7500 |" in card
    assert "| With this adapter | 1.2500 |" in card


def card_of(tmp_path: Path, provenance: dict[str, Any], *, chat: bool = False, **run: Any) -> str:
    """The card of an adapter with such a provenance."""
    report = {**REPORT, "provenance": {"base_model": None, **provenance}}
    return adapter.model_card(a_run(**run), report, chat=chat)


def test_the_model_card_says_what_it_was_made_from_without_a_path(tmp_path: Path) -> None:
    """A data set of the Hub by its name, others by their digest; the license that the base states."""
    hub = {"dataset": {"source": "hf://datasets/org/data"}}
    card = card_of(tmp_path, {"base_model": "org/name", "license": "apache-2.0"}, **hub)
    front = yaml.safe_load(card.split("---\n", 2)[1])

    assert (front["license"], front["datasets"]) == ("apache-2.0", ["org/data"])
    assert "- data: `org/data`\n- license: `apache-2.0`, as the base model's card has it; " in card

    card = card_of(tmp_path, {"dataset_sha256": "0123456789abcdef"})
    assert "- data: private, sha256 0123456789ab\n- license: not stated; those of" in card
    assert "pvc://" not in card


LICENSES = {
    "apache-2.0": {"license": "apache-2.0"},
    "llama3.2": {"license": "llama3.2"},
    "other": {"license": "other"},
    "house-terms-1.0": {"license": "other", "license_name": "house-terms-1.0"},
    None: {},
}


@pytest.mark.parametrize(("stated", "expected"), LICENSES.items())
def test_the_license_is_one_that_the_hub_takes(
    tmp_path: Path, stated: str | None, expected: dict[str, str]
) -> None:
    """It refuses a card with any other, and knows their names as such of other licenses."""
    card = card_of(tmp_path, {"license": stated})
    front = yaml.safe_load(card.split("---\n", 2)[1])

    assert card_errors(card) == []
    assert {key: value for key, value in front.items() if key.startswith("license")} == expected


@pytest.mark.parametrize("pattern", [{}, {"rankPattern": {"q_proj": 4}}, {"alphaPattern": {"q_proj": 4.0}}])
def test_the_card_says_what_vllm_would_get_wrong(tmp_path: Path, pattern: dict[str, Any]) -> None:
    """Its releases before 0.32 read one rank and one alpha for all layers."""
    assert ("vLLM before 0.32 does not read" in card_of(tmp_path, {}, adapter=pattern)) == bool(pattern)


OF_ANYWHERE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a claim": ({}, {}),
    "a bucket": ({}, {"model": {"source": "s3://bucket/m"}, "dataset": {"source": "s3://bucket/d.jsonl"}}),
    "the Hub": (
        {"base_model": "org/name", "license": "mit"},
        {"model": {"source": "hf://org/name"}, "dataset": {"source": "hf://datasets/org/data"}},
    ),
    "a web server": ({}, {"dataset": {"source": "https://data.example/a.jsonl"}}),
    "prompt tuning": (
        {"base_model": "org/name"},
        {"adapter": {"method": "prompt-tuning", "numVirtualTokens": 8}},
    ),
}


@pytest.mark.parametrize(("provenance", "run"), OF_ANYWHERE.values(), ids=OF_ANYWHERE)
def test_the_hub_takes_every_card(tmp_path: Path, provenance: dict[str, Any], run: dict[str, Any]) -> None:
    """Wherever model and data come from."""
    assert card_errors(card_of(tmp_path, provenance, **run)) == []


def test_a_data_set_is_named_once(tmp_path: Path) -> None:
    """However many of its files are sources."""
    sources = [{"source": f"hf://datasets/org/data/{name}.jsonl", "weight": 1.0} for name in "ab"]
    card = card_of(tmp_path, {}, dataset={"source": None, "sources": sources})

    assert yaml.safe_load(card.split("---\n", 2)[1])["datasets"] == ["org/data"]


@pytest.mark.parametrize(
    ("provenance", "chat", "expected"),
    [
        pytest.param(
            {"base_model": "org/name"},
            True,
            ['AutoModelForCausalLM.from_pretrained("org/name", dtype="auto")', "apply_chat_template("],
            id="by name, conversations",
        ),
        pytest.param({}, False, ['("path/to/the/base/model", ', 'tokenizer("..."'], id="by path, text"),
        pytest.param(
            {"auto_class": "AutoModelForImageTextToText"},
            True,
            ["import AutoModelForImageTextToText, AutoTokenizer", "base = AutoModelForImageTextToText."],
            id="a multimodal model",
        ),
    ],
)
def test_the_model_card_s_example_is_python_for_this_adapter(
    tmp_path: Path, provenance: dict[str, Any], chat: bool, expected: list[str]
) -> None:
    """It loads the base as its class has it, and asks as the data did."""
    card = card_of(tmp_path, provenance, chat=chat)
    program = card.partition("```python\n")[2].partition("```")[0]

    compile(program, "card", "exec")
    for part in expected:
        assert part in program


def test_the_tokenizer_goes_along_with_the_adapter(tmp_path: Path, demo_model: Path) -> None:
    """Stock tools find it there, and no path of this machine; the template is that of the data, if they had one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    staged = adapter.write_adapter(acquired(tmp_path), small_adapter(), None, "{{ mine }}", tokenizer)

    found = AutoTokenizer.from_pretrained(staged)
    assert found("one two")["input_ids"] == tokenizer("one two")["input_ids"]
    assert found.chat_template == "{{ mine }}"
    assert str(demo_model) not in (staged / "tokenizer_config.json").read_text()

    staged = adapter.write_adapter(acquired(tmp_path), small_adapter(), None, None, tokenizer)
    assert not (staged / CHAT_TEMPLATE).exists()


def test_a_tokenizer_that_cannot_be_written_costs_no_adapter(tmp_path: Path) -> None:
    """The base has it, too; a full disk is another matter."""

    class Broken:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def save_pretrained(self, _: Path) -> None:
            raise self.error

    folder = acquired(tmp_path)
    broken: Any = Broken(NotImplementedError("no vocabulary"))
    assert (adapter.write_adapter(folder, small_adapter(), None, None, broken) / ADAPTER_WEIGHTS).exists()
    with pytest.raises(StorageFull):
        adapter.write_adapter(folder, small_adapter(), None, None, Broken(OSError(28, "full")))  # type: ignore[arg-type]


def png(path: Path) -> tuple[int, int]:
    """(width, height) of a PNG whose chunks and checksums are all in order (ISO/IEC 15948)."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    position, kinds = 8, []
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        chunk = content[position + 4 : position + 8 + length]
        (checksum,) = struct.unpack(">I", content[position + 8 + length : position + 12 + length])
        assert zlib.crc32(chunk) == checksum
        kinds.append(chunk[:4])
        position += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize(
    ("steps", "base"),
    [
        pytest.param(STEPS, 2.5, id="all"),
        pytest.param([{"step": 1, "loss": 2.0}], None, id="no-evaluation"),
        pytest.param(STEPS[:1], None, id="no-step"),
    ],
)
def test_the_loss_curve_is_a_png(tmp_path: Path, steps: list[dict[str, Any]], base: float | None) -> None:
    """It is drawn without a display, whatever was measured."""
    adapter.loss_curve(steps, {"base_eval_loss": base}, tmp_path / "curve.png")

    assert png(tmp_path / "curve.png") == (960, 540)


# --- publishing


def test_a_published_adapter_is_whole(tmp_path: Path) -> None:
    """All files are in the manifest, report and curve are beside it too, and nothing else is left."""
    folder = acquired(tmp_path)
    publish(folder, small_adapter())
    manifest = json.loads((folder.adapter / MANIFEST).read_text())

    assert set(manifest["files"]) == {
        "README.md", ADAPTER_CONFIG, ADAPTER_WEIGHTS, LOSS_CURVE, TRAINING_REPORT,
    }  # fmt: skip
    assert manifest["sha256"] == manifest["files"][ADAPTER_WEIGHTS]
    assert read_manifest(folder.adapter) == manifest
    assert folder.finished()
    assert folder.report() == REPORT
    png(tmp_path / LOSS_CURVE)
    assert not list(tmp_path.glob(".*"))


def test_the_chat_template_goes_along_with_the_adapter(tmp_path: Path) -> None:
    """What wrote the conversations is where tokenizers look for it, and part of the whole."""
    folder = acquired(tmp_path)
    staged = adapter.write_adapter(folder, small_adapter(), "org/base", "{{ messages }} é")
    adapter.publish(folder, staged, REPORT, STEPS)

    assert (folder.adapter / CHAT_TEMPLATE).read_text(encoding="utf-8") == "{{ messages }} é"
    assert CHAT_TEMPLATE in json.loads((folder.adapter / MANIFEST).read_text())["files"]


def test_an_adapter_of_the_release_before_counts_as_published(tmp_path: Path) -> None:
    """Its job is finished, its tensors are found by name, and its configuration is the one that we would write."""
    from peft import LoraConfig, PeftConfig

    shutil.copytree(RELEASE / "finished", tmp_path / "job")
    folder = JobFolder(tmp_path / "job", load_run(RELEASE / "run.json"))
    written = load_file(folder.adapter / ADAPTER_WEIGHTS)
    parameters = flat_parameters({n.removeprefix(PEFT_PREFIX): t.shape for n, t in written.items()})
    adapter.reload_adapter(folder.adapter, parameters)
    config = json.loads((folder.adapter / ADAPTER_CONFIG).read_text())

    assert folder.finished()
    assert folder.report()["adapter_sha256"] == sha256(folder.adapter / ADAPTER_WEIGHTS)
    assert all(torch.equal(p, written[f"{PEFT_PREFIX}{name}"]) for name, p in parameters.named.items())
    assert adapter.adapter_config(folder.run, parameters, "/volumes/team/smoke/model") == config
    assert isinstance(PeftConfig.from_pretrained(str(folder.adapter)), LoraConfig)


def test_a_damaged_adapter_is_not_an_adapter(tmp_path: Path) -> None:
    """A changed card is enough: what is there is not what was published."""
    folder = acquired(tmp_path)
    publish(folder, small_adapter())
    (folder.adapter / "README.md").write_text("# Mine")

    assert read_manifest(folder.adapter) is None
    assert not folder.finished()


def test_an_attempt_that_lost_the_fence_publishes_nothing(tmp_path: Path) -> None:
    """When another attempt takes over at the last moment, its adapter stays."""
    old = acquired(tmp_path)
    staged = adapter.write_adapter(old, small_adapter(1.0), "org/name")
    (tmp_path / FENCE).write_text('{"uid": "u-1", "attempt": 1}')
    newer = JobFolder(
        tmp_path, old.run.model_copy(update={"job": JobRef(name="smollm2", uid="u-1", attempt=1)})
    )
    publish(newer, small_adapter(2.0))
    manifest = read_manifest(newer.adapter)

    with pytest.raises(Fenced):
        adapter.publish(old, staged, REPORT, STEPS)
    assert manifest is not None
    assert read_manifest(newer.adapter) == manifest


def test_a_discarded_adapter_leaves_nothing(tmp_path: Path) -> None:
    """Nobody finds an adapter that is no better than the base."""
    folder = acquired(tmp_path)
    adapter.write_adapter(folder, small_adapter(), "org/name")
    adapter.discard(folder)

    assert not list(tmp_path.glob(".*"))
    assert not folder.adapter.exists()


def test_a_full_disk_publishes_nothing(tiny_disk: Path) -> None:
    """The job is not finished, and the error says what was being done."""
    folder = acquired(tiny_disk / "job")
    staged = adapter.write_adapter(folder, small_adapter(), "org/name")

    with pytest.raises(StorageFull, match=r"no space left while publishing the adapter to .*/adapter"):
        adapter.publish(folder, staged, REPORT, STEPS)
    assert not folder.adapter.exists()
    assert not folder.finished()


@pytest.fixture
def tiny_disk(make_disk: Callable[[str], Path]) -> Path:
    """A file system of 40 KiB: an adapter fits, its loss curve does not."""
    return make_disk("40k")


CRASHES = (
    CRASH_AT
    + """
import itertools, json, os, pathlib, runpy, shutil, sys

from safetensors.torch import load_file

test = runpy.run_path(sys.argv[1])
place = pathlib.Path(sys.argv[2])

def found(folder):
    "What a reader and the next attempt find: the weights of the adapter, and whether the job counts as done."
    folder = test["acquired"](folder.path, attempt=1)
    if not folder.adapter.exists():
        return None, folder.finished()
    assert test["read_manifest"](folder.adapter) is not None
    tensors = load_file(folder.adapter / "adapter_model.safetensors")
    return {w for t in tensors.values() for w in t.flatten().tolist()}.pop(), folder.finished()

def outcomes(template):
    for n in itertools.count(1):
        path = place / f"crash-{n}"
        shutil.copytree(template, path)
        folder = test["acquired"](path)
        staged = test["adapter"].write_adapter(folder, test["small_adapter"](2.0), "org/name")
        child = os.fork()
        if child == 0:
            crash_at(n)
            test["adapter"].publish(folder, staged, test["REPORT"], test["STEPS"])
            os._exit(0)
        crashed = os.waitpid(child, 0)[1] != 0
        yield found(folder)
        shutil.rmtree(path)
        if not crashed:
            return

old = test["acquired"](place / "old")
test["publish"](old, test["small_adapter"](1.0))
(old.path / "training_report.json").unlink()  # the crash before left the adapter alone
test["acquired"](place / "fresh")
print(json.dumps([list(outcomes(place / name)) for name in ("fresh", "old")]))
"""
)


@pytest.mark.slow
def test_no_crash_leaves_half_an_adapter(tmp_path: Path) -> None:
    """A process that ends before any one change of the file system leaves no adapter, the old one, or the new one.

    The job counts as done only with the new one, and its very last change makes it so.
    """
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    for before, outcomes in zip((None, 1.0), json.loads(done.stdout), strict=True):
        weights = [weight for weight, _ in outcomes]
        turn = weights.index(2.0)
        finished = [finished for _, finished in outcomes].index(True)
        assert len(outcomes) > 10
        assert weights == [before] * turn + [2.0] * (len(outcomes) - turn)
        assert 0 < turn <= finished
        assert all(done for _, done in outcomes[finished:])
