"""Pure: what a job's state is, and what is to be done about it."""
