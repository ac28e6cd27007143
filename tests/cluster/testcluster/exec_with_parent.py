"""Run a program that is killed when the process that started it ends: PARENT_PID COMMAND...

A wrapper, since code between fork and exec is unsafe in a process with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it ended before the call
        sys.exit("the process that started this one has ended")
    os.execv(sys.argv[2], sys.argv[2:])
