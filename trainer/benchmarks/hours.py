"""The time that `qlora plan` tells beforehand, beside the time that the job then takes: `qlora run` of real shapes.

    python trainer/benchmarks/hours.py TOKENIZER_FOLDER WORK_FOLDER [CASE ...]

Weights are random numbers in the shapes of published models, data are random words in samples of one length. Needs a
machine that does nothing else. Prints a line of JSON for each case; results worth keeping are in LOG.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from memory import FULL, NONE, Case, folder_of, job, write_data, write_model

STEPS = 8
CASES: dict[str, Case] = {
    "135M-2-ranks": Case("SmolLM2-135M", length=512, training=NONE, ranks=2),
    "135M-fp32": Case("SmolLM2-135M", length=512, training={**NONE, "computeDtype": "fp32"}),
    "360M": Case("SmolLM2-360M", length=512, training=NONE),
    "1B-recomputed": Case("Llama-3.2-1B", length=256, training=FULL),
}


def measure(name: str, case: Case, tokenizer: Path, work: Path) -> dict[str, Any]:
    """Plan a case and run it."""
    if not (work / folder_of(case) / "config.json").is_file():
        write_model(work / folder_of(case), case.shape, tokenizer)
    write_data(work / "data.jsonl", STEPS * case.ranks)
    manifest = job(name, case)
    manifest["spec"]["training"]["maxSteps"] = STEPS
    manifest["spec"]["topology"]["memoryPerRank"] = "4Gi"
    (work / "job.json").write_text(json.dumps(manifest))
    shutil.rmtree(work / "work" / "jobs" / name, ignore_errors=True)
    where = [str(work / "job.json"), "--volume", f"bench={work}"]
    qlora = [sys.executable, "-m", "qlora_operator.cli"]
    planned = subprocess.run(
        [*qlora, "plan", *where, "-o", "json"], check=True, capture_output=True, text=True
    ).stdout
    subprocess.run([*qlora, "run", *where], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((work / "work" / "jobs" / name / "training_report.json").read_text())
    time = json.loads(planned)["time"]
    first, rest = report["timeline"]["first step"], report["timeline"]["training"]
    return {
        "case": name,
        "planned_seconds": time["trainingSeconds"],
        "seconds": first + rest,
        "planned_start_seconds": time["startSeconds"],
        "timeline": report["timeline"],
        "basis": time["basis"],
    }


def main() -> None:
    """Measure the cases that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.cases or CASES:
        found = measure(f"hours-{name.lower()}", CASES[name], options.tokenizer, options.work.resolve())
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
