"""Shell completion."""

import shutil
import subprocess
from pathlib import Path

import pytest

from qlora_contract.exit_codes import command_codes
from qlora_operator.cli.completion import SHELLS, script
from qlora_operator.cli.main import parser, subcommands_of

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ru"], {"run"}),
        (["run", "--vol"], {"--volume"}),
        (["plan", "job.yaml", "-o", ""], {"text", "json"}),
        (["completion", "f"], {"fish"}),
        (["run", "job"], {"job.yaml"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], tmp_path: Path) -> None:
    """Commands, options, choices and files."""
    (tmp_path / "job.yaml").write_text("")
    line = " ".join(f"'{word}'" for word in ["qlora", *words])
    program = (
        f"{script('bash', parser())}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _qlora; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=30
    )

    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_command_and_is_right(shell: str, tmp_path: Path) -> None:
    """By the shell's own eye, where it is installed."""
    text = script(shell, parser())
    path = tmp_path / "script"
    path.write_text(text)

    assert all(name in text for name in subcommands_of(parser()))
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(path)], check=True, timeout=30)


def test_help_has_examples_and_every_exit_code() -> None:
    """Those of the reference."""
    whole = parser().format_help()

    assert "examples:" in whole
    assert all(f"  {code:<5}{meaning.split()[0]}" in whole for code, meaning in command_codes().items())
    for name, each in subcommands_of(parser()).items():
        assert f"examples:\n  {'source <(' * (name == 'completion')}qlora {name}" in each.format_help()
        assert "exit codes:\n  0 " in each.format_help()
