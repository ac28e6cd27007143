"""The operator: `python -m qlora_operator`."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any, cast

import kopf

from qlora_operator.api.names import COMPONENT
from qlora_operator.controller import handlers, logs


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m qlora_operator", description="The QLoRAJob operator.")
    parser.add_argument(
        "--config", metavar="FILE", help="settings (default: /etc/qlora-operator/settings.yaml)"
    )
    parser.add_argument(
        "--namespace", action="append", default=[], help="serve this one; may be repeated (default: all)"
    )
    parser.add_argument(
        "--lease",
        metavar="NAMESPACE/NAME",
        default="",
        help="write only while holding this Lease (default: always)",
    )
    parser.add_argument("--port", type=int, default=handlers.PORT, help="of /metrics, /healthz and /readyz")
    parser.add_argument("--log-format", choices=["plain", "json"], default="plain")
    parser.add_argument("--verbose", action="store_true", help="log kopf's own doings, too")
    options = parser.parse_args(arguments)
    logs.set_up(options.log_format, verbose=options.verbose)
    if options.config:
        os.environ[handlers.CONFIG_ENV] = options.config
    os.environ[handlers.NAMESPACES_ENV] = ",".join(options.namespace)
    if options.lease and not re.fullmatch("[^/]+/[^/]+", options.lease):
        parser.error(f"--lease: {options.lease!r} is not NAMESPACE/NAME")
    os.environ[handlers.LEASE_ENV] = options.lease
    os.environ[handlers.PORT_ENV] = str(options.port)
    kopf.run(
        standalone=True,
        clusterwide=not options.namespace,
        namespaces=options.namespace,
        # kopf would look up the user's name, and a pod's user has none.
        identity=cast(Any, COMPONENT),
    )


if __name__ == "__main__":
    main()
