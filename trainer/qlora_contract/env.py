"""Names of environment variables that tell the trainer's processes where things are, and their defaults."""

RUN_CONFIG_ENV = "QLORA_RUN_CONFIG"
"""Path of run.json; in pods paths.RUN_CONFIG_PATH."""
VOLUMES_ENV = "QLORA_VOLUMES"
"""JSON object claim -> directory. Unset in pods, where a claim is mounted at paths.VOLUMES_ROOT/claim."""
TERMINATION_LOG_ENV = "QLORA_TERMINATION_LOG"
"""Where the launcher writes its TerminationReport; in pods paths.TERMINATION_LOG."""
PROGRESS_PORT_ENV = "QLORA_PROGRESS_PORT"
"""Port of rank 0's /progress and /metrics; PROGRESS_PORT unless set, 0 for no server."""
COMPLETION_INDEX_ENV = "JOB_COMPLETION_INDEX"
"""The pod's index, set by Kubernetes for Indexed Jobs."""
CPUS_ENV = "QLORA_CPUS"
"""CPU list, such as 0-3,8, that a launcher may use. Unset: all that the kernel allows."""
RANKS_ENV = "QLORA_RANKS"
"""How many ranks each pod has, such as 4,4,2: set by its launcher for every rank."""
PARENT_DEATH_ENV = "QLORA_PARENT_DEATH"
"""Process id of the `qlora run` that started a launcher: the launcher stops when that process dies."""
CREDENTIALS_ENV = "QLORA_CREDENTIALS"
"""Directory with the credentials of a fetch or an upload: a directory for each of `model`, `dataset` and `output`
that has a Secret, with a file for each key. Unset with `qlora run`: the libraries look in their usual places."""
PRICE_ENV = "QLORA_PRICE"
"""What a CPU costs for an hour (cost.parse_price), for the report. Unset: no money is reported."""
REQUESTED_ENV = "QLORA_REQUESTED"
"""When the attempt's pods were requested, RFC 3339. Unset with `qlora run`, where nothing waits."""

PROGRESS_PORT = 8470
RENDEZVOUS_PORT = 29500
"""Default of MASTER_PORT, where ranks meet."""
