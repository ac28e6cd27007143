"""Does our trainer learn what the plainest training on transformers, peft and bitsandbytes learns?

For each seed and scheme both sides train for the same steps from the same
adapter, on the same samples in the same order, in fp32. What differs in the end
is rounding; the table says by how much.

    python trainer/benchmarks/convergence.py [FOLDER] [--seeds 0 1 2] [--schemes nf4 none] [--steps 200]

FOLDER has what demo/model.py and demo/data.py write, in model/ and data/ (`make
demo-data`). The jobs, plans and reports stay in --output.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from peer_peft import Plan, Sample, Scheme

PEER = Path(__file__).with_name("peer_peft.py")
RANK, ALPHA = 16, 32
FOLDER = Path(__file__).parents[2] / ".cache" / "demo"


@dataclass(frozen=True)
class Case:
    """One comparison."""

    demo: Path
    """With model/ and data/."""
    output: Path
    """Where everything that is made lies."""
    seed: int
    scheme: Scheme
    steps: int
    ranks: int
    tokens: int
    """Of a step, at most."""

    @property
    def name(self) -> str:
        """Of the job and of the files."""
        return f"convergence-{self.scheme}-{self.seed}"


@dataclass(frozen=True)
class Result:
    """The evaluation losses of one side."""

    base: float
    """With the adapter as it starts, which changes nothing."""
    trained: float


def settings(case: Case) -> dict[str, Any]:
    """The job's `training`, as its file has it."""
    return {
        "maxSteps": case.steps,
        "globalBatchTokens": case.tokens,
        "maxSequenceLength": min(256, case.tokens),
        "learningRate": 1e-3,
        "schedule": "cosine",
        "warmupRatio": 0.03,
        "weightDecay": 0.0,
        "maxGradNorm": 1.0,
        "computeDtype": "fp32",
        "seed": case.seed,
    }


def job(case: Case) -> dict[str, Any]:
    """The job's file."""
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": case.name},
        "spec": {
            "workspace": "pvc://work/qlora",
            "model": {"source": "pvc://demo/model"},
            "dataset": {"source": "pvc://demo/data", "trainSplit": "train", "evalSplit": "eval"},
            "adapter": {"rank": RANK, "alpha": ALPHA},
            "quantization": {"scheme": case.scheme},
            "training": settings(case),
            "evaluation": {"requireImprovement": False},
            "topology": {
                "ranksPerPod": case.ranks,
                "cpusPerRank": 1,
                "memoryPerRank": "6Gi",
                "pinning": "best-effort",
            },
        },
    }


def ours(case: Case) -> Result:
    """Run the job with `qlora run` and read its report."""
    file = case.output / f"{case.name}.yaml"
    file.write_text(yaml.safe_dump(job(case), sort_keys=False))
    qlora = str(Path(sys.executable).with_name("qlora"))
    volumes = ["--volume", f"work={case.output}", "--volume", f"demo={case.demo}"]
    subprocess.run([qlora, "run", str(file), *volumes], check=True, stdout=sys.stderr)
    report = json.loads(
        (case.output / "qlora" / "jobs" / case.name / "training_report.json").read_text(encoding="utf-8")
    )
    return Result(report["base_eval_loss_quantized"], report["eval_loss"])


def peer(case: Case) -> Result:
    """Give the peer the same work and read what it prints."""
    plan, adapter = case.output / f"{case.name}.plan.json", case.output / f"{case.name}.start"
    write_plan(case, plan)
    write_start(case, adapter)
    paths = [str(path) for path in (PEER, case.demo / "model", adapter, plan)]
    command = [sys.executable, *paths, "--scheme", case.scheme]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    (case.output / f"{case.name}.peer.json").write_text(done.stdout)
    losses = {int(step): loss for step, loss in json.loads(done.stdout)["eval_losses"].items()}
    return Result(losses[0], losses[case.steps])


def write_plan(case: Case, path: Path) -> None:
    """What our trainer will do, for the peer to do: its samples, and which of them each step has."""
    from transformers import AutoTokenizer

    from qlora_contract.run_config import Dataset, Training
    from qlora_trainer.data import dataset as dataset_module
    from qlora_trainer.data import packing

    training = Training.model_validate(settings(case))
    dataset = Dataset.model_validate(job(case)["spec"]["dataset"])
    tokenizer = AutoTokenizer.from_pretrained(case.demo / "model", local_files_only=True)
    loaded = dataset_module.load(dataset, case.demo / "data", tokenizer, training.max_sequence_length)
    assert loaded.evaluation is not None
    ours = packing.StepSchedule(loaded.train.lengths(), training)
    Plan(
        train=listed(loaded.train),
        evaluation=listed(loaded.evaluation),
        steps=[[sample for bin_ in ours.step(step).bins for sample in bin_] for step in range(case.steps)],
        learning_rate=training.learning_rate,
        schedule=training.schedule,
        warmup_ratio=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        eval_every=case.steps,
    ).write(path)


def listed(samples: Any) -> list[Sample]:
    """Our samples as the peer reads them."""
    pairs = (samples.sample(number) for number in range(len(samples)))
    return [Sample(ids.tolist(), mask.tolist()) for ids, mask in pairs]


def write_start(case: Case, folder: Path) -> None:
    """The adapter that our trainer starts from, in PEFT's format."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from qlora_trainer.modeling.loading import load_model
    from qlora_trainer.modeling.lora import attach_adapters
    from qlora_trainer.quantization.schemes import Unquantized

    layers = load_model(case.demo / "model", Unquantized(), torch.float32).linears
    start = attach_adapters(layers, rank=RANK, alpha=ALPHA, dropout=None, seed=case.seed).named
    folder.mkdir(exist_ok=True)
    tensors = {f"base_model.model.{name}": value.detach().clone() for name, value in start.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    ).save_pretrained(folder)


def row(case: Case, mine: Result, theirs: Result) -> str:
    """A line of the table."""
    difference = (mine.trained / theirs.trained - 1) * 100
    return (
        f"| {case.scheme} | {case.seed} | {mine.base:.4f} | {theirs.base:.4f} "
        f"| {mine.trained:.4f} | {theirs.trained:.4f} | {difference:+.3f} % |"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schemes", nargs="+", choices=["nf4", "none"], default=["nf4", "none"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, at most")
    parser.add_argument("--ranks", type=int, default=2, help="of our side; changes nothing but rounding")
    parser.add_argument("--output", type=Path, help="new folder for what is made; default: a temporary one")
    arguments = parser.parse_args()
    output = arguments.output or Path(tempfile.mkdtemp(prefix="convergence-"))
    output.mkdir(parents=True, exist_ok=True)
    lines, differences = [], []
    for scheme in arguments.schemes:
        for seed in arguments.seeds:
            case = Case(
                demo=arguments.folder.resolve(),
                output=output.resolve(),
                seed=seed,
                scheme=scheme,
                steps=arguments.steps,
                ranks=arguments.ranks,
                tokens=arguments.tokens,
            )
            mine, theirs = ours(case), peer(case)
            lines.append(row(case, mine, theirs))
            differences.append(abs(mine.trained / theirs.trained - 1))
            print(lines[-1], file=sys.stderr, flush=True)
    print("| scheme | seed | base, ours | base, peer | trained, ours | trained, peer | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))
    print(f"\nlargest difference: {max(differences) * 100:.3f} %; files in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
