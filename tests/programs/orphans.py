"""Processes that have lost their parents: `orphans.py LOG`. They say what they are, and the first process logs `checked=N`.

One is a daemon whose session's leader has ended, as daemon(3) leaves it; one was left behind in a session whose leader lives;
one is in a process group whose leader has ended.
"""

import os
import time

from holding import Held, expect, run


def identity():
    return os.getpid(), os.getppid(), os.getsid(0), os.getpgid(0)


class Orphans(Held):
    def __init__(self):
        self.members = [self.tell(way) for way in (daemon, left_behind, in_a_group)]
        # Until they are adopted.
        time.sleep(0.2)
        self.identities = [self.ask(member) for member in self.members]
        expect([parent for _, parent, *_ in self.identities[:2]], [1, 1], "the orphans' parents")
        pid, _, session, group = self.identities[0]
        expect(pid != session and session == group, True, "the daemon's session")
        for name in (session, self.identities[2][3]):
            expect(os.path.exists(f"/proc/{name}"), False, "a leader that has ended")

    def tell(self, way):
        (questions, ask), (answers, answer) = os.pipe(), os.pipe()

        def work():
            while os.read(questions, 1):
                os.write(answer, repr(identity()).encode())
            os._exit(0)

        way(work)
        return ask, answers

    def ask(self, member):
        os.write(member[0], b"?")
        return eval(os.read(member[1], 100).decode())

    def check(self):
        expect([self.ask(member) for member in self.members], self.identities, "what the orphans are")


def daemon(work):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            work()
        os._exit(0)
    os.waitpid(pid, 0)


def left_behind(work):
    if os.fork() == 0:
        os.setsid()
        pid = os.fork()
        if pid == 0:
            if os.fork() == 0:
                work()
            os._exit(0)
        os.waitpid(pid, 0)
        while True:
            time.sleep(1)


def in_a_group(work):
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        time.sleep(0.1)
        os._exit(0)
    member = os.fork()
    if member == 0:
        time.sleep(0.05)
        os.setpgid(0, leader)
        work()
    os.waitpid(leader, 0)


run([Orphans()])
