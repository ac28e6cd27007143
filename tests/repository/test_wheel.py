"""The wheel and the source distribution as `pip install` gets them: fresh environments, this tree not in sight."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
SHARED = sysconfig.get_path("purelib")
"""Where the locked dependencies are: torch is not downloaded again for a test."""
CLI = (
    "_yaml", "annotated_types", "markdown_it", "mdurl", "pydantic", "pydantic_core", "pygments", "rich",
    "typing_extensions.py", "typing_inspection", "yaml",
)  # fmt: skip
"""What pyproject's `dependencies` bring, without extras."""
JOB = """\
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {name: tiny}
spec:
  workspace: pvc://here/work
  model: {source: pvc://here/model}
  dataset: {source: pvc://here/data.jsonl, evalFraction: 0}
  evaluation: {requireImprovement: false}
  training: {maxSteps: 1, maxSequenceLength: 64, globalBatchTokens: 128}
  topology: {memoryPerRank: 1Gi}
"""


def run(*command: str | Path, cwd: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    """A command that sees neither this tree nor the environment of the tests."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "QLORA_CPU_LOCKS") if name in os.environ}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=kept | environ, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, made by the pinned backend."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return folder


def environment(folder: Path, wheel: Path) -> Path:
    """A fresh virtual environment with the wheel, and nothing else; its bin folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    uv = Path(sys.executable).parent / "uv"
    python = folder / "bin" / "python"
    subprocess.run(
        [uv, "pip", "install", "-q", "--offline", "--no-deps", "--python", python, wheel], check=True
    )
    return folder / "bin"


def site_packages(bin_: Path) -> Path:
    """Of an environment."""
    return next((bin_.parent / "lib").glob("python*/site-packages"))


def test_a_wheel_of_the_source_distribution_is_the_wheel(dist: Path, tmp_path: Path) -> None:
    """Whoever builds from the sdist gets the same files, the kernels' sources among them, and nothing compiled."""
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    done = run(
        sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again", cwd=unpacked
    )
    assert done.returncode == 0, done.stderr

    names = [set(zipfile.ZipFile(path).namelist()) for path in (wheel, *(tmp_path / "again").iterdir())]
    assert names[0] == names[1]
    assert "qlora_trainer/kernels/csrc/api.cpp" in names[0]
    assert not [name for name in names[0] if "/compiled/" in name or name.startswith("tests")]


def test_the_command_without_the_trainer_says_what_it_needs(dist: Path, tmp_path: Path) -> None:
    """With the CLI's own dependencies alone, as pipx installs it: jobs are checked, and `run` names the extra."""
    (wheel,) = dist.glob("*.whl")
    bin_ = environment(tmp_path / "venv", wheel)
    for name in CLI:
        (site_packages(bin_) / name).symlink_to(Path(SHARED) / name)
    (tmp_path / "job.yaml").write_text(JOB)

    checked = run(bin_ / "qlora", "validate", "job.yaml", cwd=tmp_path)
    assert (checked.returncode, checked.stdout) == (0, "job.yaml: tiny: valid\n"), checked.stderr
    planned = run(bin_ / "qlora", "plan", "job.yaml", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "tiny: 1 rank(s)" in planned.stdout
    for command in (["run"], ["plan"]):
        refused = run(bin_ / "qlora", *command, "job.yaml", "--volume", "here=.", cwd=tmp_path)
        assert refused.returncode == 1
        assert "run pip install 'qlora-operator[trainer]'" in refused.stderr


def test_the_wheel_trains(dist: Path, tmp_path: Path) -> None:
    """From the installed files alone: plan, kernels compiled before the first job, an adapter."""
    (wheel,) = dist.glob("*.whl")
    bin_ = environment(tmp_path / "venv", wheel)
    # A path in a .pth file is not searched for .pth files: this tree, installed there for editing, stays out of sight.
    (site_packages(bin_) / "shared.pth").write_text(f"{SHARED}\n")
    where = run(bin_ / "python", "-c", "import qlora_trainer; print(qlora_trainer.__file__)", cwd=tmp_path)
    assert str(tmp_path) in where.stdout
    made = run(bin_ / "python", "-m", "qlora_trainer.smoke_model", tmp_path / "smoke", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    (tmp_path / "smoke" / "job.yaml").write_text(JOB)
    volume = ("--volume", f"here={tmp_path / 'smoke'}")

    planned = run(bin_ / "qlora", "plan", tmp_path / "smoke" / "job.yaml", *volume, cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    trained = run(bin_ / "qlora", "run", tmp_path / "smoke" / "job.yaml", *volume, cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "kernel library: " in trained.stdout
    assert (tmp_path / "smoke" / "work" / "jobs" / "tiny" / "adapter" / "adapter_model.safetensors").is_file()
    again = run(bin_ / "qlora", "run", tmp_path / "smoke" / "job.yaml", *volume, cwd=tmp_path)
    assert "kernel library: " not in again.stdout
