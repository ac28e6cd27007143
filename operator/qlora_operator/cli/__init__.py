"""The `qlora` command: one job on this machine, without a cluster. What trains runs in processes of its own."""
