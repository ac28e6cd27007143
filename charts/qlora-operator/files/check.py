"""What `helm test` asks: does the API server know QLoRAJobs, and is the operator ready?

    check.py API_SERVER OPERATOR CREDENTIALS SECONDS

CREDENTIALS is the folder with a service account's token and the API server's ca.crt; each check may take SECONDS to
come true.
"""

# ruff: noqa: S310 - both addresses are the chart's own

import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path


def jobs_are_known(server: str, credentials: Path) -> str | None:
    """None, or what is wrong."""
    request = urllib.request.Request(
        f"{server}/apis/qlora.dev/v1alpha1",
        headers={"Authorization": f"Bearer {(credentials / 'token').read_text()}"},
    )
    trust = ssl.create_default_context(cafile=str(credentials / "ca.crt"))
    with urllib.request.urlopen(request, timeout=10, context=trust) as answer:
        known = [resource["name"] for resource in json.load(answer)["resources"]]
    return None if "qlorajobs" in known else f"the API server knows {known}, but no qlorajobs"


def operator_is_ready(operator: str) -> str | None:
    """None, or what is wrong."""
    with urllib.request.urlopen(f"{operator}/readyz", timeout=10) as answer:
        answer.read()
    return None


def until(check: Callable[[], str | None], seconds: float) -> str | None:
    """None once nothing is wrong; what is, after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            wrong = check()
        except urllib.error.HTTPError as error:
            wrong = f"{error.url}: {error.code} {error.read(500).decode(errors='replace').strip()}"
        except OSError as error:
            wrong = str(error)
        if wrong is None or time.monotonic() > deadline:
            return wrong
        time.sleep(1)


def main() -> int:
    """Print each answer; 1 after the first that is no."""
    server, operator, credentials, seconds = sys.argv[1:]
    checks: dict[str, Callable[[], str | None]] = {
        "the API server knows QLoRAJobs": lambda: jobs_are_known(server, Path(credentials)),
        "the operator is ready": lambda: operator_is_ready(operator),
    }
    for name, check in checks.items():
        wrong = until(check, float(seconds))
        print(f"{name}: {'yes' if wrong is None else f'no: {wrong}'}", flush=True)
        if wrong is not None:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
