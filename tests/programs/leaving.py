"""Processes that leave what they have in common when they are told to: `leaving.py LOG DIRECTORY`.

Until LOG.leave exists three processes have tables in common with the first one (`shared=N` in the log); then one calls
unshare(2) for its descriptors, one for its directories, and one executes another program, which leaves its descriptors, and goes on
with the directories (`left=N`).
"""

import os
import sys
import time

from tables import CLONE_FILES, CLONE_FS, UNSHARE, Process, call, place, target  # noqa: F401 (the others call them)

log_path, directory = sys.argv[1], sys.argv[2]
# What a process that executes it goes on with.
PROGRAM = """
import os, sys
told, answers = int(sys.argv[1]), int(sys.argv[2])
def target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return None
def place():
    mask = os.umask(0)
    os.umask(mask)
    return os.getcwd(), mask
os.write(answers, b"'ready'")
while True:
    os.write(answers, repr(eval(os.read(told, 1000).decode())).encode())
"""


class Executing(Process):
    def execute(self):
        """Has it execute PROGRAM, with the ends of its pipes, by their numbers in the common table."""
        arguments = [sys.executable, "-c", PROGRAM, str(self.theirs[0]), str(self.theirs[1])]
        inherit = "".join(f"os.set_inheritable({fd}, True), " for fd in self.theirs)
        return self.do(f"({inherit}os.execv({sys.executable!r}, {arguments!r}))")


def say(text):
    with open(log_path, "a", buffering=1) as log:
        log.write(text + "\n")


os.makedirs(f"{directory}/0")
os.makedirs(f"{directory}/1")
files, places, both = Process(CLONE_FILES), Process(CLONE_FS), Executing(CLONE_FILES | CLONE_FS)
left = False
number = 0
while True:
    number += 1
    if not left and os.path.exists(log_path + ".leave"):
        files.do("call(UNSHARE, CLONE_FILES)")
        places.do("call(UNSHARE, CLONE_FS)")
        if both.execute() != "ready":
            say("MISMATCH: another program was not executed")
        left = True
    os.chdir(f"{directory}/{number % 2}")
    # Never again as it was when they left.
    os.umask((0o40 if left else 0o20) + number % 8)
    fd = os.open(log_path, os.O_RDONLY | os.O_CREAT)
    for one, name in ((files, "unshare"), (both, "execve")):
        seen = one.do(f"target({fd})") == log_path
        if seen == left:
            say(f"MISMATCH: after {name}, seeing a descriptor of the first process is {seen}")
    os.close(fd)
    for one, name, leaves in ((places, "unshare", True), (both, "execve", False)):
        seen = one.do("place()") == place()
        if seen == (left and leaves):
            say(f"MISMATCH: after {name}, being where the first process is is {seen}")
    say(f"{'left' if left else 'shared'}={number}")
    time.sleep(0.02)
