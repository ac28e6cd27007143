"""What Linux tells about this machine and this process, and what it lets a process set. Standard library only."""
