"""What a job leaves that needs torch to write or to read: checkpoints, the adapter, its report and metrics."""
