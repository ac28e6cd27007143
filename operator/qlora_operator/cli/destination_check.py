"""Whether a destination takes uploads, asked before training rather than after it: one request, by urllib alone."""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from qlora_contract.exit_codes import ExitCode
from qlora_contract.remote import Remote, parse_remote
from qlora_operator.errors import CommandError

SECONDS = 5.0
"""For the answer. Who is slower is asked again after training, by a program that tries for half an hour."""
HUB = "https://huggingface.co"


def check_destination(uri: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Why the destination could not be asked, in a sentence; None: it was, and has nothing against an upload.

    Raises:
        CommandError: it will refuse the upload.
    """
    remote = parse_remote(uri)
    try:
        refusal = _bucket(remote, environ) if remote.kind == "bucket" else _hub(remote, environ)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return (
            f"{uri} cannot be asked now whether it takes the adapter ({reason}); training goes on, and the upload is "
            "tried after it"
        )
    if refusal:
        raise CommandError(f"the destination {uri}: {refusal}", ExitCode.TRANSFER_REFUSED)
    return None


def _hub(remote: Remote, environ: Mapping[str, str]) -> str | None:
    """Why the Hub will not take an upload to a repository."""
    token = hub_token(environ)
    if token is None:
        return "there is no token to upload with: set HF_TOKEN, or run `hf auth login`"
    request = urllib.request.Request(  # noqa: S310 - the Hub's address is the user's own
        f"{(environ.get('HF_ENDPOINT') or HUB).rstrip('/')}/api/whoami-v2",
        headers={"Authorization": f"Bearer {token}"},
    )
    status, body = _ask(request)
    if status == 401:
        return "the token is not valid (any more): create one that may write, and set HF_TOKEN"
    try:
        role = json.loads(body)["auth"]["accessToken"]["role"]
    except (ValueError, KeyError, TypeError):
        return None
    if role == "read":
        return f"the token may only read; {remote.root} needs one that may write"
    return None


def hub_token(environ: Mapping[str, str]) -> str | None:
    """The token that huggingface_hub would use: of the environment, or the one that was saved."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := environ.get(name, "").strip():
            return token
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    try:
        return Path(environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser().read_text().strip() or None
    except (OSError, RuntimeError):
        return None


def _bucket(remote: Remote, environ: Mapping[str, str]) -> str | None:
    """Why a bucket will not take an upload: that there is none. Who may write only a signed request would tell."""
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    # Names with dots do not fit the certificate of a host of their own.
    url = f"{(endpoint or 'https://s3.amazonaws.com').rstrip('/')}/{remote.root}"
    if urlsplit(url).scheme not in ("http", "https"):
        return None
    status, _ = _ask(urllib.request.Request(url, method="HEAD"))  # noqa: S310 - the scheme was just looked at
    return "there is no such bucket: create it first, or change output.destination" if status == 404 else None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A bucket of another region answers with a redirect: it is there. A token is never sent elsewhere."""

    def redirect_request(self, *_: object) -> None:
        return None


def _ask(request: urllib.request.Request) -> tuple[int, bytes]:
    """(status, body) of an answer, whatever its status. Raises OSError when there is none."""
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=SECONDS) as answer:
            return answer.status, answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b""
