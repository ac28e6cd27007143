"""A cluster's own certificate authority, made with openssl."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from testcluster.errors import ClusterError

DAYS = "365"


def make_authority(folder: Path) -> None:
    """Write ca.crt and ca.key."""
    subject = [
        "-subj",
        "/CN=qlora-test-cluster",
        "-days",
        DAYS,
        "-addext",
        "keyUsage=critical,keyCertSign,cRLSign",
    ]
    _openssl(["req", "-x509", *_new_key(folder / "ca.key"), *subject, "-out", str(folder / "ca.crt")])


def make_key(path: Path) -> None:
    """Write a private key that signs service account tokens."""
    _openssl(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(path)])


def issue(
    folder: Path,
    name: str,
    common_name: str,
    organisations: tuple[str, ...] = (),
    addresses: tuple[str, ...] = (),
) -> None:
    """Write <name>.crt and <name>.key, signed by the folder's authority, for a client or server.

    The user is `common_name` and the groups are `organisations`; `addresses`
    are a server's alternative names, each as `IP:...` or `DNS:...`.
    """
    subject = "".join(f"/O={organisation}" for organisation in organisations) + f"/CN={common_name}"
    request = folder / f"{name}.csr"
    _openssl(["req", "-new", *_new_key(folder / f"{name}.key"), "-subj", subject, "-out", str(request)])
    extensions = ["extendedKeyUsage=clientAuth,serverAuth", "keyUsage=critical,digitalSignature"]
    if addresses:
        extensions.append(f"subjectAltName={','.join(addresses)}")
    signer = [
        "-CA",
        str(folder / "ca.crt"),
        "-CAkey",
        str(folder / "ca.key"),
        "-CAcreateserial",
        "-days",
        DAYS,
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".ext") as file:
        file.write("\n".join(extensions))
        file.flush()
        output = ["-extfile", file.name, "-out", str(folder / f"{name}.crt")]
        _openssl(["x509", "-req", "-in", str(request), *signer, *output])
    request.unlink()


def _new_key(path: Path) -> list[str]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path)]


def _openssl(arguments: list[str]) -> None:
    if shutil.which("openssl") is None:
        raise ClusterError("openssl is not installed: install it (Debian: apt-get install openssl)")
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
