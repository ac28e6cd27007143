"""The page: numbers first, curves, then everything that the job was made of.

What it shows comes from data, names and other releases: every text is escaped, and whatever is missing or has another
form is left out.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from qlora_contract.cost import AttemptRecord, Cost
from qlora_contract.job_folder import EXPORTS
from qlora_contract.units import format_bytes, format_duration
from qlora_trainer.report import timeline
from qlora_trainer.report.charts import Chart, Limit, Line, Point, svg

LONGEST = 2_000
"""Characters of a text that is shown."""
STYLE = """
:root { color-scheme: light dark; --fg: #1b1f24; --dim: #5f6773; --bg: #fff; --box: #f6f7f9; --edge: #dde1e6;
  --s0: #1f6feb; --s1: #d1570b; --s2: #1a7f37; --l0: #6b7280; --l1: #a371f7; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e7eb; --dim: #9aa3af; --bg: #14171b; --box: #1c2026;
  --edge: #30363d; --s0: #58a6ff; --s1: #f0883e; --s2: #3fb950; --l0: #9aa3af; --l1: #bc8cff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 1240px; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; } h2 { margin: 2rem 0 .6rem; font-size: 1.15rem; }
.state { margin: .2rem 0 1.2rem; color: var(--dim); overflow-wrap: anywhere; }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); }
.tiles div, figure { padding: .7rem .9rem; background: var(--box); border: 1px solid var(--edge); border-radius: 8px; }
.tiles b { display: block; font-size: 1.25rem; font-weight: 600; } .tiles span { color: var(--dim); font-size: .85rem; }
.tiles small { display: block; color: var(--dim); }
.charts { display: grid; gap: .8rem; margin-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; }
figure p { margin: 0 0 .3rem; min-height: 1.4rem; font-size: .8rem; color: var(--dim); }
.key { display: inline-block; margin-right: 1rem; }
.key::before { content: ""; display: inline-block; width: 1.1rem; margin-right: .35rem; vertical-align: .22rem;
  border-top: 3px solid var(--c); }
.key.limit::before { border-top: 2px dashed var(--c); } .key.mark::before { border-top: 2px dotted var(--dim); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 12px; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .l0 { --c: var(--l0); } .l1 { --c: var(--l1); }
rect, circle { fill: var(--c); } path { fill: none; }
.line { stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.grid { stroke: var(--edge); } .limit { stroke: var(--c); stroke-width: 1.5; stroke-dasharray: 6 4; }
.mark { stroke: var(--dim); stroke-dasharray: 2 3; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--edge);
  overflow-wrap: anywhere; }
th { color: var(--dim); font-weight: 500; } .facts th { min-width: 13rem; }
.columns { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); }
.answers td { white-space: pre-wrap; min-width: 14rem; } .exports td:last-child { font-family: monospace; }
.exports td:nth-child(-n+2) { white-space: nowrap; }
footer { margin-top: 2rem; color: var(--dim); font-size: .85rem; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load for the page: its own style sheet, and nothing else."""


def render(
    report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    attempts: Sequence[AttemptRecord],
    cost: Cost | None,
    name: str,
) -> str:
    """The page.

    Args:
        report: training_report.json, or report.json of a job that is not finished; with `answers`, and with `exports`:
            export_report.json by form.
        metrics: the lines of metrics.jsonl.
        attempts: attempts.json.
        cost: of these attempts; None where none was recorded.
        name: of the job.
    """
    charts = [svg(chart) for chart in charts_of(report, metrics, attempts)]
    sections = [
        f'<div class="tiles">{"".join(_tiles(report, metrics, cost))}</div>',
        f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "<p>No step is done yet.</p>",
        _section("Timeline", timeline.svg(attempts, metrics)),
        _answers(_mapping(report.get("answers"))),
        _exports(_mapping(report.get("exports"))),
        '<div class="columns">',
        _section("Data", _facts(_data(report))),
        _section("What it cost", _facts(_cost(cost))),
        _section("Provenance", _facts(_flat(_mapping(report.get("provenance"))))),
        _section("Where the time of the last attempt went", _facts(_timeline(report))),
        _section("Memory of a rank", _facts(_memory(report))),
        _section("Configuration", _facts(_flat(_mapping(report.get("configuration"))))),
        "</div>",
        _section("Attempts", _table(_ATTEMPT_COLUMNS, _attempts(attempts))),
        _section("Ranks", _table(_RANK_COLUMNS, _ranks(report))),
    ]
    title = _text(name)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f'<h1>{title}</h1><p class="state">{_text(state_of(report, attempts))}</p>'
        f"{''.join(sections)}<footer>Written by qlora-operator. It loads nothing from elsewhere.</footer>"
        "</body></html>\n"
    )


def state_of(report: Mapping[str, Any], attempts: Sequence[AttemptRecord]) -> str:
    """Where the job stands, in a sentence."""
    ended = attempts[-1].ended if attempts else None
    if report.get("adapter_sha256"):
        state = f"finished {report.get('finished') or ''}".strip()
        # What comes after the adapter may fail: exports.
        return (
            state
            if not ended or ended.startswith(("adapter published", "exported "))
            else f"{state}; since then: {ended}"
        )
    as_of = f"as of {report['finished']}" if report.get("finished") else "unfinished"
    return f"not finished, {as_of}: {ended}" if ended else f"not finished, {as_of}"


def charts_of(
    report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], attempts: Sequence[AttemptRecord]
) -> list[Chart]:
    """The curves."""
    configuration, plan = _mapping(report.get("configuration")), _mapping(report.get("plan"))
    norm = _number(_mapping(configuration.get("training")).get("maxGradNorm"))
    marks = [float(each.first_step) for each in attempts if each.first_step]
    losses = [("base, quantized", "base_eval_loss_quantized"), ("base, unquantized", "base_eval_loss")]
    speeds = [
        (float(line["step"]), tokens / seconds)
        for line in metrics
        if (tokens := _number(line.get("tokens"))) is not None and (seconds := _number(line.get("seconds")))
    ]
    return [
        Chart(
            "Loss per supervised token",
            [
                Line("training", _points(metrics, "loss")),
                Line("evaluation", _points(metrics, "eval_loss"), dots=True),
            ],
            _limits(report, losses),
            marks,
        ),
        Chart(
            "Learning rate",
            [Line("learning rate", _points(metrics, "learning_rate"))],
            (),
            marks,
            from_zero=True,
        ),
        Chart(
            "Gradient norm",
            [Line("before clipping", _points(metrics, "grad_norm"))],
            [] if norm is None else [Limit("clipped to", norm)],
            marks,
            from_zero=True,
        ),
        Chart("Tokens per second", [Line("all ranks", speeds)], (), marks, "{:,.0f}".format, from_zero=True),
        Chart(
            "Tokens of a step",
            [
                Line("all", _points(metrics, "tokens")),
                Line("supervised", _points(metrics, "supervised_tokens")),
            ],
            (),
            marks,
            "{:,.0f}".format,
            from_zero=True,
        ),
        Chart(
            "Memory of the largest rank",
            [Line("peak so far", _points(metrics, "memory_peak"))],
            _limits(plan, [("planned", "memory_bytes"), ("memoryPerRank", "memory_per_rank_bytes")]),
            marks,
            lambda value: format_bytes(round(value)),
            from_zero=True,
            binary=True,
        ),
    ]


def _points(metrics: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    values = ((line["step"], _number(line.get(name))) for line in metrics)
    return [(float(step), value) for step, value in values if value is not None]


def _limits(values: Mapping[str, Any], names: Iterable[tuple[str, str]]) -> list[Limit]:
    found = [(label, _number(values.get(name))) for label, name in names]
    return [Limit(label, value) for label, value in found if value is not None]


def _tiles(
    report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], cost: Cost | None
) -> Iterable[str]:
    before, after = _number(report.get("base_eval_loss_quantized")), _number(report.get("eval_loss"))
    if after is None:
        evaluated = _points(metrics, "eval_loss")
        after = evaluated[-1][1] if evaluated else None
    if after is not None:
        yield _tile("eval loss", f"{after:.4f}", _change(before, after))
    steps = report.get("steps")
    if isinstance(steps, int):
        total = report.get("total_steps", steps)
        epochs = _number(report.get("epochs"))
        yield _tile(
            "steps", f"{steps:,} of {_whole(total)}", "" if epochs is None else f"{epochs:.2f} epochs"
        )
    if (tokens := _number(report.get("tokens"))) is not None:
        yield _tile("tokens", f"{tokens:,.0f}", f"{_whole(report.get('supervised_tokens'))} supervised")
    if (speed := _number(report.get("tokens_per_second"))) is not None:
        yield _tile("tokens per second", f"{speed:,.0f}", f"{_whole(report.get('world_size'))} rank(s)")
    if (seconds := _number(report.get("seconds"))) is not None:
        yield _tile("in training steps", format_duration(seconds), str(report.get("isa") or ""))
    # Of all attempts: the report's own is of the last one.
    peaks = [_number(report.get("peak_memory_bytes")), *(size for _, size in _points(metrics, "memory_peak"))]
    if (peak := max((size for size in peaks if size is not None), default=None)) is not None:
        plan = _number(_mapping(report.get("plan")).get("memory_bytes"))
        planned = "" if plan is None else f"{format_bytes(round(plan))} planned"
        yield _tile("memory of a rank", format_bytes(round(peak)), planned)
    if cost is not None:
        yield _tile("core-hours", f"{cost.core_hours:.3g}", _money(cost) or "no price given")


def _change(before: float | None, after: float) -> str:
    if not before:
        return "base not measured"
    share = 100 * abs(before - after) / before
    return f"base {before:.4f}: {share:.1f} % {'below' if after <= before else 'above'}"


def _tile(label: str, value: str, more: str) -> str:
    return f"<div><span>{_text(label)}</span><b>{_text(value)}</b><small>{_text(more)}</small></div>"


def _data(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for use, split in _mapping(report.get("data")).items():
        lengths = _lengths(_mapping(split).get("lengths"))
        for name, value in _flat({**_mapping(split), "lengths": lengths}):
            rows.append((f"{use}: {name.replace('_', ' ')}", value))
    evaluated = _mapping(report.get("evaluated"))
    return rows + [(f"evaluated: {name.replace('_', ' ')}", value) for name, value in _flat(evaluated)]


def _lengths(bins: Any) -> str:
    """A histogram of lengths (plan.LengthBin), in words."""
    counts = [
        (_whole(_mapping(each).get("upTo")), _whole(_mapping(each).get("count")))
        for each in (bins if isinstance(bins, list) else [])
    ]
    return ", ".join(f"{count} of up to {longest}" for longest, count in counts if longest and count)


def _memory(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan = _mapping(report.get("plan"))
    names = [("planned", plan.get("memory_bytes")), ("memoryPerRank", plan.get("memory_per_rank_bytes"))]
    names += [(f"planned for {part}", size) for part, size in _mapping(plan.get("parts")).items()]
    names.append(("largest peak", report.get("peak_memory_bytes")))
    rows = [
        (name, format_bytes(round(size))) for name, value in names if (size := _number(value)) is not None
    ]
    for name in ("micro_batch_tokens", "checkpointing"):
        if name in plan:
            rows.append((name.replace("_", " "), _plain(plan[name])))
    return rows


def _timeline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    spent = _mapping(report.get("timeline"))
    return [(name, f"{value:,.1f} s") for name, of in spent.items() if (value := _number(of)) is not None]


def _cost(cost: Cost | None) -> list[tuple[str, str]]:
    if cost is None:
        return []
    queue = "unknown" if cost.queue_seconds is None else format_duration(cost.queue_seconds)
    energy = "unknown: the processors' counters cannot be read here"
    if cost.energy_kwh is not None:
        energy = f"{cost.energy_kwh:.3g} kWh, of all that ran on its machines"
    lost = f"{cost.lost_steps:,} steps made again after restarts, {cost.lost_core_hours:.3g} core-hours"
    return [
        ("core-hours", f"{cost.core_hours:.4g}"),
        ("money", _money(cost) or "unknown: no price per core-hour is given"),
        ("time", f"{format_duration(cost.seconds)} in {cost.attempts} attempt(s)"),
        ("queue", queue),
        ("lost work", lost),
        ("energy", energy),
    ]


def _money(cost: Cost) -> str:
    if cost.money is None or cost.price_per_core_hour is None:
        return ""
    each = f"{cost.price_per_core_hour:g} {cost.currency}".strip()
    amount = f"{cost.money:,.2f}" if cost.money >= 1 else f"{cost.money:.2g}"
    return f"{amount} {cost.currency}".strip() + f", at {each} an hour"


_ATTEMPT_COLUMNS = ("attempt", "began", "took", "CPUs", "steps", "lost steps", "ended")


def _attempts(attempts: Sequence[AttemptRecord]) -> Iterable[Sequence[str]]:
    for each in attempts:
        steps = "none" if each.step is None else f"{each.first_step or 0:,} to {each.step:,}"
        ended = each.ended or ("runs, or was killed" if each is attempts[-1] else "was killed")
        took = format_duration(each.seconds)
        yield str(each.attempt), each.began, took, str(each.cpus), steps, str(each.lost_steps), ended


_RANK_COLUMNS = ("rank", "host", "processor", "CPUs", "threads", "tokens", "peak memory")


def _ranks(report: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    ranks = report.get("ranks")
    for rank in ranks if isinstance(ranks, list) else []:
        facts = _mapping(rank)
        peak = _number(facts.get("peak_memory_bytes"))
        cells = [_plain(facts.get(name)) for name in ("rank", "host", "isa", "cpus", "threads")]
        yield [*cells, _whole(facts.get("tokens")), "" if peak is None else format_bytes(round(peak))]


def _answers(answers: Mapping[str, Any]) -> str:
    rows = answers.get("prompts")
    if not isinstance(rows, list) or not rows:
        return ""
    columns = ("prompt", "reference", "base", "adapter")
    cells = [[_plain(_mapping(row).get(name)) for name in columns] for row in rows]
    scores = [
        [name.replace("_", " "), *(_score(_mapping(of).get(side)) for side in ("base", "adapter"))]
        for name, of in _mapping(answers.get("scores")).items()
    ]
    longest = _whole(answers.get("longest"))
    note = f"Answers of at most {longest} tokens, the most probable ones." if longest else ""
    if answers.get("in_time") is False:
        note += " They were cut off when their time was over."
    table = f"<p>{_text(note)}</p>" if note else ""
    table += _table(("held-out prompt", "answer in the data", "base", "with the adapter"), cells, "answers")
    if scores:
        table += _table(("of these answers", "base", "with the adapter"), scores)
    return _section("Answers to held-out prompts", table)


_EXPORT_COLUMNS = (
    "form",
    "size",
    "KL divergence from the trained model",
    "same next token",
    "the adapter's effect",
    "to serve it, from the job's folder",
)


def _exports(exports: Mapping[str, Any]) -> str:
    rows: list[list[str]] = []
    for form, made in exports.items():
        report = _mapping(made)
        proof = _mapping(report.get("proof"))
        if not rows and (base := _number(proof.get("base_kl_divergence"))) is not None:
            rows.append(["the base alone", "", f"{base:.2g} nats", "", "", ""])
        size, divergence = _number(report.get("bytes")), _number(proof.get("kl_divergence"))
        rows.append(
            [
                form,
                "" if size is None else format_bytes(round(size)),
                "" if divergence is None else f"{divergence:.2g} nats",
                _score(proof.get("greedy_agreement")),
                _score(proof.get("adapter_share")),
                serving_command(form, report.get("file")),
            ]
        )
    return _section("Exports", _table(_EXPORT_COLUMNS, rows, "exports"))


def serving_command(form: str, file: Any) -> str:
    """What serves an export.

    Args:
        form: what it is, and its folder in `exports`.
        file: its GGUF file; None where it has none.
    """
    folder = f"{EXPORTS}/{form}"
    if file is None:
        return f"vllm serve {shlex.quote(folder)}"
    path = shlex.quote(f"{folder}/{file}")
    if form == "gguf-lora":
        return f"llama-server -m BASE.gguf --lora {path} --jinja"
    return f"llama-server -m {path} --jinja"


def _score(value: Any) -> str:
    share = _number(value)
    return "" if share is None else f"{100 * share:.0f} %"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if body else ""


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="facts">{cells}</table></div>' if cells else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{body}</table></div>' if body else ""


def _flat(values: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    """The leaves of nested maps, and of lists of maps, by their paths; what is not set is left out."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        where = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            rows += _flat(value, where)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            rows += _flat({str(number): item for number, item in enumerate(value)}, where)
        elif value not in (None, [], ""):
            rows.append((where, _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return "" if value is None else str(value)


def _text(text: str) -> str:
    """Escaped, without control characters, of bounded length."""
    shown = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    return escape(
        "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in shown)
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    """A finite number, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def _whole(value: Any) -> str:
    number = _number(value)
    return "" if number is None else f"{number:,.0f}"
