"""Files in the workspace that survive crashes, full disks and a second writer. Nothing here needs torch."""
