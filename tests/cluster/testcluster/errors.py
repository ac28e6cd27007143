"""What can go wrong with a test cluster.

ClusterError
└── KubectlError     kubectl ended with an error
"""


class ClusterError(Exception):
    """The test cluster cannot do it: the sentence says what is missing and what to install or set."""


class KubectlError(ClusterError):
    """kubectl ended with an error; `stderr` is what it said."""

    def __init__(self, arguments: tuple[str, ...], code: int, stderr: str) -> None:
        super().__init__(f"kubectl {' '.join(arguments)} ended with {code}: {stderr.strip()}")
        self.stderr = stderr
