"""What the programs that hold descriptors and check them have in common. They are started as `NAME.py LOG ...`.

A program has a list of things that it holds. Over and over it checks all of them, and logs `checked=N`; when LOG.drain
exists, it lets each empty what is queued in it, compare that with what was put in, and fill it again, and logs `drained=N`.
What is not as it should be is logged as a MISMATCH, and ends the program.
"""

import os
import sys
import time
import traceback

PAUSE_S = 0.02


class Held:
    """Something that is held."""

    def check(self):
        """Raises unless all is as it was, and leaves it so."""

    def drain(self):
        """Takes out what is queued, raises unless it is what was put in, and puts in something new."""


def expect(found, wanted, what):
    if found != wanted:
        raise AssertionError(f"{what}: {found!r} instead of {wanted!r}")


def flags(fd):
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETFL)


def fdinfo(fd, name):
    """The values of all lines `name:` of a descriptor's fdinfo."""
    with open(f"/proc/self/fdinfo/{fd}") as text:
        return [line.split(":", 1)[1].split() for line in text if line.startswith(name + ":")]


def by_child(work):
    """What `work` returns in a child process: a small number."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(int(work()))
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(held):
    path = sys.argv[1]
    log = open(path, "a", buffering=1)
    checked = drained = 0
    while True:
        try:
            for one in held:
                one.check()
            checked += 1
            log.write(f"checked={checked}\n")
            if os.path.exists(path + ".drain"):
                for one in held:
                    one.drain()
                os.remove(path + ".drain")
                drained += 1
                log.write(f"drained={drained}\n")
        except BaseException:
            log.write(f"MISMATCH in {type(one).__name__}: {traceback.format_exc()}\n")
            os._exit(1)
        time.sleep(PAUSE_S)
