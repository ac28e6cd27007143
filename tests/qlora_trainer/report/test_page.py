"""The page: complete, safe, and the same for every browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.cost import AttemptRecord, cost_of, parse_price
from qlora_trainer.report.page import render, serving_command, state_of

HOSTILE = "</td></table><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;'\""
VOID = {"meta", "img", "link", "br"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The elements of a page, whose tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element begins."""
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element without content."""
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        """One ends: the innermost."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text."""
        self.text.append(data)


def an_attempt(number: int = 0, **fields: Any) -> AttemptRecord:
    """One of a hundred seconds on two CPUs."""
    known = {"job_uid": "u", "attempt": number, "began": "2026-01-01T00:00:00Z", "seconds": 100.0, "cpus": 2}
    return AttemptRecord.model_validate({**known, **fields})


METRICS: list[dict[str, Any]] = [
    {"step": 0, "loss": None, "eval_loss": 3.0},
    *(
        {
            "step": step,
            "loss": 3.0 / step,
            "learning_rate": 0.1 / step,
            "grad_norm": 1.0,
            "tokens": 1000,
            "supervised_tokens": 400,
            "seconds": 2.0,
            "memory_peak": 800 * 2**20,
        }
        for step in range(1, 9)
    ),
    {"step": 8, "loss": None, "eval_loss": 2.0},
]
REPORT: dict[str, Any] = {
    "job": "demo",
    "base_eval_loss": 2.9,
    "base_eval_loss_quantized": 3.0,
    "eval_loss": 2.0,
    "steps": 8,
    "total_steps": 8,
    "epochs": 0.5,
    "tokens": 8000,
    "supervised_tokens": 3200,
    "seconds": 16.0,
    "tokens_per_second": 500.0,
    "world_size": 2,
    "isa": "avx2",
    "peak_memory_bytes": 800 * 2**20,
    "plan": {"memory_bytes": 2**30, "memory_per_rank_bytes": 2 * 2**30, "parts": {"base": 2**29}},
    "data": {
        "training": {
            "records": 90,
            "truncated": 4,
            "lengths": [{"upTo": 64, "count": 1234}, {"upTo": 128, "count": 7}],
        }
    },
    "configuration": {
        "training": {"maxGradNorm": 1.5, "seed": 3},
        "adapter": {"targetModules": ["q", "v"]},
        "dataset": {"sources": [{"source": "pvc://a/x"}, {"source": "pvc://a/y", "weight": 2}]},
    },
    "provenance": {"model_source": "pvc://a/m", "weights_sha256": "ab" * 32, "versions": {"torch": "2.15"}},
    "ranks": [{"rank": 0, "host": "node-a", "isa": "avx2", "cpus": "0-1", "tokens": 4000}],
    "finished": "2026-01-01T01:00:00Z",
    "adapter_sha256": "cd" * 32,
}


def rendered(report: dict[str, Any] = REPORT, metrics: list[dict[str, Any]] = METRICS) -> str:
    """The page after two attempts."""
    attempts = [
        an_attempt(first_step=0, step=6, ended="a peer was lost"),
        an_attempt(1, first_step=4, step=8, lost_steps=2, lost_seconds=4.0, ended="adapter published"),
    ]
    return render(report, metrics, attempts, cost_of(attempts, parse_price("1.8 EUR")), "demo")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Loss per supervised token", id="losses"),
        pytest.param("Learning rate", id="learning rate"),
        pytest.param("Gradient norm", id="gradient norm"),
        pytest.param("Tokens per second", id="speed"),
        pytest.param("Memory of the largest rank", id="memory"),
        pytest.param("planned 1.00 GiB", id="the plan's memory"),
        pytest.param("clipped to 1.5", id="where gradients are clipped"),
        pytest.param("base, quantized 3", id="the base's loss"),
        pytest.param("base 3.0000: 33.3 % below", id="what was gained"),
        pytest.param("went on from a checkpoint", id="restarts"),
        pytest.param("training: truncated", id="data"),
        pytest.param("training.seed", id="configuration"),
        pytest.param("dataset.sources.1.weight", id="one of several sources"),
        pytest.param("1,234 of up to 64, 7 of up to 128", id="lengths"),
        pytest.param("q, v", id="a list"),
        pytest.param("ab" * 32, id="digest of the weights"),
        pytest.param("versions.torch", id="versions"),
        pytest.param("0.1111", id="core-hours"),
        pytest.param("0.2 EUR, at 1.8 EUR an hour", id="money"),
        pytest.param("2 steps made again after restarts, 0.00222 core-hours", id="lost work"),
        pytest.param("unknown: the processors' counters cannot be read here", id="energy"),
        pytest.param("a peer was lost", id="how attempts ended"),
        pytest.param("attempt 1", id="timeline"),
        pytest.param("node-a", id="ranks"),
        pytest.param("finished 2026-01-01T01:00:00Z", id="state"),
    ],
)
def test_the_page_shows(text: str) -> None:
    """What a reader looks for."""
    assert any(text in part for part in Page(rendered()).text)


def an_export(**fields: Any) -> dict[str, Any]:
    """export_report.json."""
    proof = {
        "kl_divergence": 0.0016,
        "greedy_agreement": 0.98,
        "adapter_share": 0.995,
        "base_kl_divergence": 0.2,
    }
    return {"bytes": 138 * 2**20, "proof": proof, **fields}


def test_exports_stand_beside_the_base_with_how_to_serve_them() -> None:
    """Size, divergence, agreement, the adapter's effect, and a command."""
    exports = {"merged": an_export(), "gguf-q8_0": an_export(file="demo-q8_0.gguf")}
    text = Page(rendered(REPORT | {"exports": exports})).text
    row = text.index("gguf-q8_0")

    assert text[text.index("the base alone") + 1] == "0.2 nats"
    assert text[row + 1 : row + 5] == ["138 MiB", "0.0016 nats", "98 %", "100 %"]
    assert text[row + 5] == "llama-server -m exports/gguf-q8_0/demo-q8_0.gguf --jinja"
    assert "Exports" not in Page(rendered()).text


@pytest.mark.parametrize(
    ("form", "file", "expected"),
    [
        ("merged", None, "vllm serve exports/merged"),
        ("gguf-f16", "a.gguf", "llama-server -m exports/gguf-f16/a.gguf --jinja"),
        ("gguf-lora", "a.gguf", "llama-server -m BASE.gguf --lora exports/gguf-lora/a.gguf --jinja"),
        ("gguf-f16", "a; reboot", "llama-server -m 'exports/gguf-f16/a; reboot' --jinja"),
    ],
)
def test_the_command_that_serves_an_export(form: str, file: str | None, expected: str) -> None:
    """A name from a file is one word of it, whatever it is."""
    assert serving_command(form, file) == expected


def test_the_page_needs_nothing_else() -> None:
    """No script, no link, no image, and a browser is told to load nothing."""
    page = Page(rendered())

    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not re.search(r"url\(|@import|https?:", rendered())


def everywhere(value: Any) -> Any:
    """A value whose texts, and whose names of maps, are hostile."""
    if isinstance(value, dict):
        return {**{key: everywhere(item) for key, item in value.items()}, HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [everywhere(item) for item in value] + [HOSTILE]
    return HOSTILE if isinstance(value, str) else value


def test_no_text_can_do_anything() -> None:
    """Names, sources, messages and answers are shown as they are, and are never markup."""
    report = everywhere(REPORT | {"answers": ANSWERS, "exports": {"merged": an_export(file="f")}})
    hostile = [an_attempt(ended=HOSTILE, began=HOSTILE)]
    page = Page(render(report, METRICS, hostile, cost_of(hostile, None), HOSTILE))

    assert not {"script", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count(HOSTILE) > 10


def test_control_characters_are_replaced() -> None:
    """They have no place in a page."""
    assert "\x1b" not in rendered(REPORT | {"provenance": {"model_source": "\x1b[31mred\x00"}})


ANSWERS: dict[str, Any] = {
    "prompts": [{"prompt": "2 + 2?", "reference": "4", "base": "Two and\ntwo", "adapter": "4"}],
    "scores": {"exact_match": {"base": 0.0, "adapter": 1.0}},
}


def test_answers_stand_side_by_side_with_their_scores() -> None:
    """Base and adapter, after the prompt and what the data say."""
    text = Page(rendered(REPORT | {"answers": ANSWERS | {"longest": 32, "in_time": False}})).text
    note = "Answers of at most 32 tokens, the most probable ones. They were cut off when their time was over."
    assert note in text
    start = text.index("2 + 2?")

    assert text[start : start + 4] == ["2 + 2?", "4", "Two and\ntwo", "4"]
    assert text[text.index("exact match") :][1:3] == ["0 %", "100 %"]


DAMAGED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "of an earlier release": {
        name: REPORT[name] for name in ("steps", "tokens", "seconds", "tokens_per_second", "provenance")
    },
    "of other forms": dict.fromkeys(REPORT, "text"),
    "of lists": {name: [1, {"a": 2}] for name in REPORT},
    "of truth values": dict.fromkeys(REPORT, True),
    "of nothing": dict.fromkeys(REPORT),
    "of what is no number": {**REPORT, "eval_loss": float("nan"), "seconds": float("inf")},
}


@pytest.mark.parametrize("report", DAMAGED.values(), ids=DAMAGED)
def test_a_page_shows_what_there_is(report: dict[str, Any]) -> None:
    """A report that lacks facts, or has them in another form, still becomes a page."""
    page = Page(rendered(report))

    assert "demo" in page.text
    assert not re.search(r"\b(nan|inf)\b", " ".join(page.text))
    assert Page(render(report, [], [], None, "x")).text.count("No step is done yet.") == 1


STATES: dict[str, tuple[dict[str, Any], list[AttemptRecord], str]] = {
    "finished": (REPORT, [an_attempt(ended="adapter published")], "finished 2026-01-01T01:00:00Z"),
    "not exported": (
        REPORT,
        [an_attempt(ended="no space")],
        "finished 2026-01-01T01:00:00Z; since then: no space",
    ),
    "running": ({"finished": "T"}, [an_attempt()], "not finished, as of T"),
    "failed": ({"finished": "T"}, [an_attempt(ended="no gradient")], "not finished, as of T: no gradient"),
    "before the first checkpoint": ({}, [], "not finished, unfinished"),
}  # fmt: skip


@pytest.mark.parametrize(("report", "attempts", "expected"), STATES.values(), ids=STATES)
def test_the_state_is_one_sentence(
    report: dict[str, Any], attempts: list[AttemptRecord], expected: str
) -> None:
    """Under the name: whether the job is finished, and if not, why it stands."""
    assert state_of(report, attempts) == expected


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed here")
def test_a_browser_shows_the_page_and_runs_nothing(tmp_path: Path) -> None:
    """Headless Chromium parses it, draws a chart for each curve, and hostile text stays text."""
    assert BROWSER is not None
    path = tmp_path / "report.html"
    path.write_text(rendered(everywhere(REPORT | {"answers": ANSWERS}) | {"job": HOSTILE}))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )

    assert "owned" not in re.findall(r"<title>(.*?)</title>", done.stdout)[0]
    assert done.stdout.count("<svg") == 7
    assert "<script" not in done.stdout
