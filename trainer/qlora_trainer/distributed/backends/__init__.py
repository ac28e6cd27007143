"""The backends of torch.distributed that a job can name: gloo, ccl, mpi. `registry.prepare` makes one usable."""
