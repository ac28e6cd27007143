"""A real Kubernetes for tests: built from Go modules, started on this machine, removed without a trace."""
