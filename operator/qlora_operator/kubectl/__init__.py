"""`kubectl qlora`: the `qlora` command for the jobs of a cluster."""
