"""Says of what is released from which sources it was made, and signs that, by openssl and a key.

An in-toto statement with SLSA provenance (v1) of every file, in a DSSE envelope, in a Sigstore bundle: what cosign
verifies (docs/releasing.md). No time is in it, so that the same sources give the same statement.
"""

import base64
import hashlib
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
BUILD_TYPE = "https://qlora.dev/releases/v1"
"""What externalParameters mean: `make release TAG=...` of the sources that resolvedDependencies name."""
BUILDER = "https://qlora.dev/releases/by-hand"
"""Whoever holds the key of releases, on a machine of their own."""

Object = dict[str, Any]


def base_image(dockerfile: str) -> str:
    """The base that a Dockerfile names, such as python@sha256:..."""
    found = re.search(r"^ARG BASE_IMAGE=(\S+)$", dockerfile, re.MULTILINE)
    assert found, "the Dockerfile names its base"
    return found[1]


def predicate(tag: str, commit: str, base: str, locks: Mapping[str, str]) -> Object:
    """What a release was made from.

    Args:
        tag: of the release.
        commit: that it names.
        base: the images' base, by its digest.
        locks: sha256, in hexadecimal, of the files that name every package and its hashes, by path.
    """
    name, _, digest = base.partition("@sha256:")
    materials = [
        {"uri": f"git+https://qlora.dev/qlora-operator@refs/tags/{tag}", "digest": {"gitCommit": commit}},
        {"uri": f"pkg:docker/{name}@sha256:{digest}", "digest": {"sha256": digest}},
        *({"name": path, "digest": {"sha256": sha256}} for path, sha256 in sorted(locks.items())),
    ]
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"tag": tag},
            "resolvedDependencies": materials,
        },
        "runDetails": {"builder": {"id": BUILDER}},
    }


def statement(sums: Mapping[str, str], said: Object) -> Object:
    """What is said of files. `sums`: their sha256 in hexadecimal, by name."""
    subjects = [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in sorted(sums.items())]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": said,
    }


def bundle(said: Object, key: Path) -> Object:
    """The statement, signed: a Sigstore bundle. Raises as `sign` does."""
    payload = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    signature = sign(pre_authentication_encoding(payload), key)
    hint = hashlib.sha256(_openssl(["pkey", "-in", str(key), "-pubout", "-outform", "DER"])).digest()
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": _text(hint)}},
        "dsseEnvelope": {
            "payload": _text(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": _text(signature), "keyid": ""}],
        },
    }


def pre_authentication_encoding(payload: bytes) -> bytes:
    """What DSSE signs of a payload: its type, too, so that it cannot be taken for something else."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def sign(content: bytes, key: Path) -> bytes:
    """An ECDSA signature of the content's sha256, in DER. `key`: the private key, in PEM.

    Raises:
        subprocess.CalledProcessError: openssl cannot use the key.
    """
    return _openssl(["dgst", "-sha256", "-sign", str(key)], content)


def public_key(key: Path) -> bytes:
    """The key that verifies, in PEM. Raises as `sign` does."""
    return _openssl(["pkey", "-in", str(key), "-pubout"])


def _openssl(arguments: list[str], content: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *arguments], input=content, stdout=subprocess.PIPE, check=True).stdout


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
