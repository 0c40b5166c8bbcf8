"""Replace this process by a program that gets SIGTERM when the parent dies, however it dies.

Run as a script: `python _exec_with_parent.py PARENT_PID PROGRAM ARGUMENT...`. A flag of the kernel (Linux's
PR_SET_PDEATHSIG) survives exec, so that no orphaned server keeps a port and a GPU after a `kill -9`. Setting it
between fork and exec in the parent (`preexec_fn`) is unsafe in a process with threads, and gRPC starts many.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Set the flag, make sure that the parent is still there, and become the program."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it died before the flag was set
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
