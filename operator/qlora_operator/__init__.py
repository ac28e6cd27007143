"""The operator's side: what a user may write, and what becomes of it on a cluster or on one machine."""
