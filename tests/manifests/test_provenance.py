"""What is said of a release, and that it can be verified by others."""

import base64
import hashlib
import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

provenance: Any = importlib.import_module("provenance")
release: Any = importlib.import_module("release")

COMMIT = "c0ffee" * 6 + "c0ff"
LOCKS = {"requirements/operator.txt": "a" * 64}
PREDICATE = provenance.predicate("v1.2.0", COMMIT, f"python@sha256:{'b' * 64}", LOCKS)
WHEEL = b"a wheel"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key, made as docs/releasing.md says."""
    file = tmp_path / "release.key"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(file)],
        check=True,
        capture_output=True,
    )
    return file


@pytest.fixture
def dist(tmp_path: Path, key: Path) -> Path:
    """A release of one file."""
    folder = tmp_path / "dist"
    folder.mkdir()
    (folder / "wheel.whl").write_bytes(WHEEL)
    release.write_provenance(folder, PREDICATE, key)
    return folder


def verify(folder: Path, signature: bytes, content: bytes) -> None:
    """By another implementation than the one that signs, and the key that is published."""
    public = serialization.load_pem_public_key((folder / release.PUBLIC_KEY).read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(signature, content, ec.ECDSA(hashes.SHA256()))


def envelope(folder: Path) -> dict[str, Any]:
    """The signed statement's."""
    return dict(json.loads((folder / release.SIGNED).read_text())["dsseEnvelope"])


def test_the_statement_says_of_each_file_what_it_was_made_from(dist: Path) -> None:
    """An in-toto statement with SLSA provenance: the tag, its commit, the base and every lock by its digest."""
    said = json.loads(base64.b64decode(envelope(dist)["payload"]))

    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["subject"] == [{"name": "wheel.whl", "digest": {"sha256": hashlib.sha256(WHEEL).hexdigest()}}]
    assert said["predicateType"] == "https://slsa.dev/provenance/v1"
    definition = said["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == {"tag": "v1.2.0"}
    assert [each["digest"] for each in definition["resolvedDependencies"]] == [
        {"gitCommit": COMMIT},
        {"sha256": "b" * 64},
        {"sha256": "a" * 64},
    ]
    assert said["predicate"]["runDetails"]["builder"]["id"]
    assert json.loads((dist / release.PREDICATE).read_text()) == said["predicate"]


def test_the_statement_is_signed(dist: Path) -> None:
    """What is signed are the length and bytes of type and payload, as DSSE has it; nothing else passes."""
    signed = envelope(dist)
    payload = base64.b64decode(signed["payload"])
    signature = base64.b64decode(signed["signatures"][0]["sig"])

    head = f"DSSEv1 28 application/vnd.in-toto+json {len(payload)} ".encode()
    verify(dist, signature, head + payload)
    with pytest.raises(InvalidSignature):
        verify(dist, signature, head + payload.replace(b"v1.2.0", b"v1.2.1"))


def test_the_bundle_names_its_key(dist: Path) -> None:
    """By the hash of the key's own encoding, as Sigstore's clients look for it."""
    material = json.loads((dist / release.SIGNED).read_text())["verificationMaterial"]
    public = serialization.load_pem_public_key((dist / release.PUBLIC_KEY).read_bytes())
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)

    assert base64.b64decode(material["publicKey"]["hint"]) == hashlib.sha256(der).digest()


def test_the_sums_are_signed(dist: Path) -> None:
    """Of all files, the provenance among them; the signature is one that openssl verifies by itself."""
    sums = (dist / "SHA256SUMS").read_bytes()

    verify(dist, (dist / "SHA256SUMS.sig").read_bytes(), sums)
    assert {line.split("  ")[1] for line in sums.decode().splitlines()} == {
        "wheel.whl",
        release.SIGNED,
        release.PREDICATE,
        release.PUBLIC_KEY,
    }
    own = [
        "openssl",
        "dgst",
        "-sha256",
        "-verify",
        "release.pub",
        "-signature",
        "SHA256SUMS.sig",
        "SHA256SUMS",
    ]
    assert subprocess.run(own, cwd=dist, check=True, capture_output=True).stdout == b"Verified OK\n"
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=dist, check=True)


def test_the_same_sources_give_the_same_statement(dist: Path) -> None:
    """Nothing in it depends on when or where it was made."""
    before = envelope(dist)["payload"]
    said = provenance.statement({"wheel.whl": hashlib.sha256(WHEEL).hexdigest()}, PREDICATE)

    assert json.loads(base64.b64decode(before)) == said


def test_a_key_that_cannot_be_used_is_no_signature(tmp_path: Path) -> None:
    """It ends with openssl's own words, and without a file that looks signed."""
    (tmp_path / "key").write_text("no key")
    (tmp_path / "dist").mkdir()

    with pytest.raises(subprocess.CalledProcessError):
        release.write_provenance(tmp_path / "dist", PREDICATE, tmp_path / "key")
    assert list((tmp_path / "dist").iterdir()) == []


def test_the_base_is_pinned() -> None:
    """The base that the Dockerfile names is one by its digest, and every stage stands on it or on another stage."""
    text = (Path(__file__).parents[2] / "Dockerfile").read_text()
    stages = {line.split()[3] for line in text.splitlines() if line.startswith("FROM ")}
    bases = {line.split()[1] for line in text.splitlines() if line.startswith("FROM ")}

    name, _, digest = provenance.base_image(text).partition("@sha256:")
    assert name == "python"
    assert len(digest) == 64
    assert bases - stages == {"${BASE_IMAGE}"}
