"""Builds what a release consists of from one tag, and prints the commands that would publish it. Publishes nothing.

    python manifests/release.py v0.1.0 [--registry REGISTRY] [--only python|chart|images ...]

What is built goes to dist/, which is emptied first: wheel, source distribution, chart, an SBOM of each image
(docs/images.md), and SHA256SUMS. Fails, after building what it can, when the tree is not that of the tag or something
could not be built. HELM names helm, and SYFT the program that lists what is in an image; `make release` builds both.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
CHART = "charts/qlora-operator"
PARTS = ("python", "chart", "images")


def faults(tag: str, version: str, chart: str, changelog: str) -> list[str]:
    """Why these sources are not a release of this tag.

    Args:
        tag: such as v0.1.0.
        version: of pyproject.toml.
        chart: the text of Chart.yaml.
        changelog: the text of CHANGELOG.md.
    """
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, but pyproject.toml has version {version}: it must be v{version}")
    for field in ("version", "appVersion"):
        stated = re.search(rf'^{field}: "?([^"\n]+)"?$', chart, re.MULTILINE)
        if stated is None or stated[1] != version:
            has = stated[1] if stated else "none"
            found.append(f"Chart.yaml has {field} {has}: it must be {version}")
    if f"## [{version}]" not in changelog:
        found.append(f"CHANGELOG.md has no section [{version}]: rename Unreleased, and begin a new one")
    return found


def git_faults(tag: str, status: str, tags: Sequence[str]) -> list[str]:
    """Why the working tree is not the tag's. `status`: of git, --porcelain. `tags`: that point at HEAD."""
    found = []
    if status.strip():
        found.append("the working tree has changes that are not committed")
    if tag not in tags:
        found.append(f"HEAD is not tagged {tag}: git tag --sign {tag}")
    return found


def publishing(version: str, registry: str, files: Sequence[str]) -> list[str]:
    """The commands that publish, in their order: what others refer to comes first.

    Args:
        version: of the release.
        registry: where images and chart go.
        files: the names in dist/.
    """
    commands = [f"git push origin v{version}"]
    for target in ("qlora-operator", "qlora-trainer"):
        commands.append(f"$BUILDER tag {target}:{version} {registry}/{target}:{version}")
        commands.append(f"$BUILDER push {registry}/{target}:{version}")
        commands.append(
            f"cosign attest --type spdxjson --predicate dist/{target}-{version}.spdx.json {registry}/{target}@DIGEST"
        )
    if archive := next((name for name in files if name.endswith(".tgz")), None):
        commands.append(f"helm push dist/{archive} oci://{registry}/charts")
    if packages := [f"dist/{name}" for name in files if name.endswith((".whl", ".tar.gz"))]:
        commands.append(f"twine upload {' '.join(packages)}")
    commands.append(f"attach to the release: {' '.join(f'dist/{name}' for name in [*files, 'SHA256SUMS'])}")
    return commands


# --- building


def build_python() -> str | None:
    """Wheel and source distribution. Returns why not, or None."""
    return _run([sys.executable, "-m", "hatchling", "build", "-d", str(DIST)])


def build_chart() -> str | None:
    """The chart's archive."""
    helm = os.environ.get("HELM") or shutil.which("helm")
    if not helm:
        return "there is no helm; HELM names one"
    return _run([helm, "package", CHART, "--destination", str(DIST)])


def build_images() -> str | None:
    """Both images, and the SBOM of each where SYFT is set."""
    if not os.environ.get("SYFT"):
        return _run(["images/build.sh"]) or "without SYFT there are no SBOMs"
    return _run(["images/build.sh"])


def _run(command: Sequence[str]) -> str | None:
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False)
    return f"{' '.join(command)} ended with exit code {done.returncode}" if done.returncode else None


BUILDERS: dict[str, Callable[[], str | None]] = {
    "python": build_python,
    "chart": build_chart,
    "images": build_images,
}


def write_sums() -> list[str]:
    """SHA256SUMS of dist/; the names in it."""
    files = sorted(path for path in DIST.iterdir() if path.is_file() and path.name != "SHA256SUMS")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (DIST / "SHA256SUMS").write_text("".join(lines))
    return [path.name for path in files]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, build, and say how to publish; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tag")
    parser.add_argument("--registry", default="REGISTRY")
    parser.add_argument("--only", action="append", choices=PARTS)
    options = parser.parse_args(arguments)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = faults(
        options.tag,
        project["version"],
        (ROOT / CHART / "Chart.yaml").read_text(),
        (ROOT / "CHANGELOG.md").read_text(),
    )
    found += git_faults(
        options.tag, _git("status", "--porcelain"), _git("tag", "--points-at", "HEAD").split()
    )
    # Nothing of another release is published along with this one.
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    for part in options.only or PARTS:
        if problem := BUILDERS[part]():
            found.append(f"{part}: {problem}")
    files = write_sums()
    print("\nIn dist/:", *files, "SHA256SUMS", sep="\n  ")
    print(
        "\nTo publish, in this order:", *publishing(project["version"], options.registry, files), sep="\n  "
    )
    if found:
        print("\nNot to be published:", *found, sep="\n  ", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
