"""A program whose child stops itself again and again: `stopped.py LOG`.

Each time the parent has to be told once, and the child stays stopped until LOG.go exists.
"""

import os
import signal
import sys
import time


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as stat:
        if stat.read().rsplit(")", 1)[1].split()[0] == "T":
            return True
    time.sleep(0.01)
    return False


def main():
    log = open(sys.argv[1], "a", buffering=1)
    go = sys.argv[1] + ".go"
    child = os.fork()
    if child == 0:
        count = 0
        while True:
            os.kill(os.getpid(), signal.SIGSTOP)
            count += 1
            log.write(f"continued={count}\n")
    while True:
        pid, status = os.waitpid(child, os.WUNTRACED)
        if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGSTOP:
            log.write(f"MISMATCH the child has status {status:#x}\n")
        while not os.path.exists(go):
            if os.waitpid(child, os.WUNTRACED | os.WNOHANG) != (0, 0):
                log.write("MISMATCH the parent is told of one stop twice\n")
            # Looked into by an agent, it seems to run for a moment.
            if not any(is_stopped(child) for _ in range(100)):
                log.write("MISMATCH the child is not stopped\n")
            log.write("stopped=1\n")
            time.sleep(0.02)
        os.remove(go)
        os.kill(child, signal.SIGCONT)


main()
