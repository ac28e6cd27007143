"""A process that ends before its n-th change of the file system: the beginning of a script."""

CRASH_AT = """
import os, sys

def crash_at(n):
    "End this process before its n-th change of the file system."
    left = n
    def change():
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(9)
    def audit(event, args):
        opened = event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE
        if opened or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            change()
    fsync = os.fsync
    os.fsync = lambda handle: (change(), fsync(handle))
    sys.addaudithook(audit)
"""
