"""The running operator: watch events in, one queue, one reconciliation at a time for each job."""
