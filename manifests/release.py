"""Builds what a release consists of from one tag, and prints the commands that would publish it. Publishes nothing.

    python manifests/release.py v0.1.0 [--registry REGISTRY] [--only python|chart|images ...]

What is built goes to dist/, which is emptied first: wheel, source distribution, chart, an SBOM of each image
(docs/images.md), provenance, and SHA256SUMS, signed by the key in the file that SIGNING_KEY names. Fails, after
building what it can, when the tree is not that of the tag or something could not be built or signed. HELM names helm,
and SYFT the program that lists what is in an image; `make release` builds both.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import provenance

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
CHART = "charts/qlora-operator"
PARTS = ("python", "chart", "images")
EPOCH = 315532800
"""The time of files in archives and images: the earliest that a zip archive can hold."""


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
    commands = [f"git push origin v{version}", "cosign import-key-pair --key $SIGNING_KEY -o signing"]
    attest = "cosign attest --key signing.key --type"
    made_from = f"slsaprovenance1 --predicate dist/{PREDICATE}"
    for target in ("qlora-operator", "qlora-trainer"):
        pushed = f"{registry}/{target}@DIGEST"
        commands.append(f"$BUILDER tag {target}:{version} {registry}/{target}:{version}")
        commands.append(f"$BUILDER push {registry}/{target}:{version}")
        commands.append(f"cosign sign --key signing.key {pushed}")
        commands.append(f"{attest} {made_from} {pushed}")
        commands.append(f"{attest} spdxjson --predicate dist/{target}-{version}.spdx.json {pushed}")
    if archive := next((name for name in files if name.endswith(".tgz")), None):
        pushed = f"{registry}/charts/qlora-operator@DIGEST"
        commands.append(f"helm push dist/{archive} oci://{registry}/charts")
        commands.append(f"cosign sign --key signing.key {pushed}")
        commands.append(f"{attest} {made_from} {pushed}")
    if packages := [f"dist/{name}" for name in files if name.endswith((".whl", ".tar.gz"))]:
        commands.append(f"twine upload {' '.join(packages)}")
    commands.append(f"attach to the release: {' '.join(f'dist/{name}' for name in files)}")
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
    return package_chart(helm, ROOT / CHART, DIST)


def package_chart(helm: str, chart: Path, target: Path) -> str | None:
    """The chart's archive, the same whenever its files were written. Returns why not, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, chart.name)
        shutil.copytree(chart, copy)
        for path in copy.rglob("*"):
            os.utime(path, (EPOCH, EPOCH))
        return _run([helm, "package", str(copy), "--destination", str(target)])


def build_images() -> str | None:
    """Both images on the base that the Dockerfile pins, and no other, and the SBOM of each where SYFT is set."""
    base = provenance.base_image((ROOT / "Dockerfile").read_text())
    failed = _run(["images/build.sh"], {**os.environ, "BASE_IMAGE": base})
    return failed or (None if os.environ.get("SYFT") else "without SYFT there are no SBOMs")


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str | None:
    done = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False)
    return f"{' '.join(command)} ended with exit code {done.returncode}" if done.returncode else None


BUILDERS: dict[str, Callable[[], str | None]] = {
    "python": build_python,
    "chart": build_chart,
    "images": build_images,
}


# --- signing

PREDICATE = "provenance.json"
"""What a release was made from, to be attested of images."""
SIGNED = "provenance.sigstore.json"
"""The same of the files in dist/, signed."""
SUMS = "SHA256SUMS"
PUBLIC_KEY = "release.pub"


def write_provenance(folder: Path, predicate: dict[str, object], key: Path) -> None:
    """What the files in a folder were made from, and their sums, signed.

    Raises:
        subprocess.CalledProcessError: openssl cannot use the key.
    """
    said = provenance.statement(_sums(folder), predicate)
    (folder / SIGNED).write_text(json.dumps(provenance.bundle(said, key), indent=1))
    (folder / PREDICATE).write_text(json.dumps(predicate, indent=1))
    (folder / PUBLIC_KEY).write_bytes(provenance.public_key(key))
    (folder / f"{SUMS}.sig").write_bytes(provenance.sign(write_sums(folder).encode(), key))


def write_sums(folder: Path) -> str:
    """SHA256SUMS of the files in a folder; its text."""
    text = "".join(f"{sha256}  {name}\n" for name, sha256 in _sums(folder).items())
    (folder / SUMS).write_text(text)
    return text


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(SUMS))
    return {path.name: _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _made_from(tag: str) -> dict[str, object]:
    """The sources of a release: of this tree."""
    locks = {str(path.relative_to(ROOT)): _sha256(path) for path in (ROOT / "requirements").glob("*.txt")}
    base = provenance.base_image((ROOT / "Dockerfile").read_text())
    return provenance.predicate(tag, _git("rev-parse", "HEAD").strip(), base, locks)


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
    if key := os.environ.get("SIGNING_KEY"):
        write_provenance(DIST, _made_from(options.tag), Path(key))
    else:
        write_sums(DIST)
        found.append("nothing is signed: SIGNING_KEY names the file with the private key")
    files = sorted(path.name for path in DIST.iterdir() if path.is_file())
    print("\nIn dist/:", *files, sep="\n  ")
    print(
        "\nTo publish, in this order:", *publishing(project["version"], options.registry, files), sep="\n  "
    )
    if found:
        print("\nNot to be published:", *found, sep="\n  ", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
