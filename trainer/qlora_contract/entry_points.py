"""The modules that one process starts another with: `python -m MODULE`.

They are a part of the contract: an operator of one release starts the image of another.
"""

LAUNCH = "qlora_trainer.launch"
"""Starts and supervises the ranks of one pod."""
RANK = "qlora_trainer"
"""One rank: what the launcher starts."""
FORK_SERVER = "qlora_trainer.launch.fork_server_main"
"""What ranks are forked from once it has imported torch."""
TRANSFER = "qlora_trainer.transfer"
"""Fetches remote sources into the workspace, or publishes the adapter."""
PLAN = "qlora_trainer.plan"
"""Answers `qlora plan`: what this machine has, and what a job would do on it."""
REPORT = "qlora_trainer.report"
"""Writes report.html of a job's folder, for `qlora report`."""
EXPORT = "qlora_trainer.export"
"""Makes of an adapter what is served: a merged model, GGUF files."""
CHAT = "qlora_trainer.chat"
"""Answers questions with a job's model: `qlora chat` and `qlora compare`."""
KERNELS = "qlora_trainer.kernels.build"
"""Compiles the kernel library, which no wheel has, before the first job of an installation."""
