"""What a process tells others: live progress over HTTP, and how it ended."""
