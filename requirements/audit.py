"""Does a locked dependency have a known vulnerability that a newer version fixes? (`make audit`, part of `make check`)

pip-audit asks the package index's own database. An index that is a mirror, or none, has no such database; then there
is nothing to compare with, which is printed, and the check passes. So that a mirror's silence is not taken for good
news, it is first asked about an old version of which a vulnerability is known.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LOCKS = ("bench.txt", "torch.txt", "uv.txt", "demo-model.txt")
"""Together they hold every package that any lock file holds."""
ACCEPTED = HERE / "accepted-vulnerabilities.list"
KNOWN = "idna==3.4"
"""Vulnerable: CVE-2024-3651."""
SECONDS = 300

Dependency = dict[str, Any]
"""As pip-audit's JSON has one: name, and version and vulns, or skip_reason."""


class NoAnswerError(Exception):
    """Nobody tells of vulnerabilities here; why."""


def ask(arguments: Sequence[str], text: str | None = None) -> list[Dependency]:
    """What pip-audit says of requirements. Raises NoAnswerError."""
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off", "--disable-pip"]
    try:
        done = subprocess.run(
            [*command, *arguments], input=text, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"no answer within {SECONDS} s") from None
    try:
        dependencies: list[Dependency] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2]
        raise NoAnswerError(last or f"pip-audit ended with {done.returncode}") from None
    return dependencies


def check_index() -> None:
    """Raises NoAnswerError where a vulnerability that everybody knows is not known."""
    found = ask(["--no-deps", "-r", "/dev/stdin"], f"{KNOWN}\n")
    if not any(dependency.get("vulns") for dependency in found):
        raise NoAnswerError(f"it knows of none in {KNOWN}, which has one")


def read_accepted(text: str) -> dict[str, str]:
    """Id -> why it does no harm here. Raises ValueError for an id without a reason."""
    accepted = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            identifier, _, reason = line.partition(" ")
            if not reason.strip():
                raise ValueError(
                    f"{ACCEPTED.name}: {identifier} has no reason; write why it does no harm here"
                )
            accepted[identifier] = reason.strip()
    return accepted


def fixable(dependencies: Iterable[Dependency], accepted: Iterable[str]) -> list[str]:
    """A line for each vulnerability that another version fixes and that nobody has accepted."""
    known = set(accepted)
    return sorted(
        f"{dependency['name']} {dependency['version']}: {found['id']}, "
        f"fixed in {', '.join(found['fix_versions'])}"
        for dependency in dependencies
        for found in dependency.get("vulns", [])
        if found["fix_versions"] and found["id"] not in known
    )


def main() -> int:
    accepted = read_accepted(ACCEPTED.read_text(encoding="utf-8"))
    try:
        check_index()
        dependencies = ask(["--require-hashes", *(f"-r{HERE / lock}" for lock in LOCKS)])
    except NoAnswerError as reason:
        print(f"vulnerabilities: not checked, the package index does not tell of any: {reason}")
        return 0
    faults = fixable(dependencies, accepted)
    for fault in faults:
        print(fault)
    looked_at = sum("vulns" in dependency for dependency in dependencies)
    print(f"vulnerabilities: {looked_at} locked packages looked at, {len(faults)} to be fixed")
    if faults:
        print(f"Run `make lock` for newer versions, or write the id and a reason into {ACCEPTED.name}.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
