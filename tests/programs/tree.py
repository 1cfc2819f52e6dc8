"""A tree of processes that checks itself, for the scenarios: `tree.py LOG PROCESSES PAUSE_S`.

A numbered token goes round a ring of processes, from pipe to pipe. Whoever has it checks its own memory, the memory that
all share, its pids, session and group, and passes it on. The first process logs each round; a line that is missing
or comes twice, or a MISMATCH, shows that something was lost. It also keeps a zombie, and collects it when LOG.reap exists.
A grandchild in a session of its own answers numbered messages over a pair of unix sockets.
"""

import mmap
import os
import socket
import struct
import sys
import time

PAGE = 4096
PRIVATE_PAGES = 1024
NUMBER = struct.Struct("<Q")


def main():
    log_path, processes, pause_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    log = open(log_path, "a", buffering=1)
    shared = mmap.mmap(-1, 256 * PAGE)
    ring = [os.pipe() for _ in range(processes)]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    if os.fork() == 0:
        # Two generations: the grandchild loses its parent, and is adopted by the init.
        if os.fork() == 0:
            os.setsid()
            ours.close()
            answer(log, theirs)
        os._exit(0)
    os.wait()
    theirs.close()

    for place in range(1, processes):
        if os.fork() == 0:
            if place % 2 == 0:
                os.setpgid(0, 0)
            keep(log, ring, place, processes)
            Member(log, shared, place, processes, ring[place][0], ring[(place + 1) % processes][1]).run()
    keep(log, ring, 0, processes)
    first = Member(log, shared, 0, processes, ring[0][0], ring[1 % processes][1])
    zombie = make_zombie()
    os.write(first.onward, NUMBER.pack(1))
    rounds = 0
    while True:
        first.step(last=rounds * processes)
        rounds += 1
        ours.send(NUMBER.pack(rounds))
        if ours.recv(64) != NUMBER.pack(rounds + 1):
            fail(log, "the grandchild's answer is not the next number")
        if state_of(zombie) != "Z":
            fail(log, "the zombie is not there")
        reaped = ""
        if os.path.exists(log_path + ".reap"):
            status = os.waitpid(zombie, 0)[1]
            reaped = f" reaped={os.WEXITSTATUS(status)}"
            os.remove(log_path + ".reap")
            zombie = make_zombie()
        log.write(f"round={rounds}{reaped}\n")
        time.sleep(pause_s)


def make_zombie():
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    while state_of(pid) != "Z":
        pass
    return pid


def state_of(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "gone"


def keep(log, ring, place, processes):
    """Closes all ends of the ring but the two that this process uses."""
    for number, (reader, writer) in enumerate(ring):
        if number != place:
            os.close(reader)
        if number != (place + 1) % processes:
            os.close(writer)


def identity():
    return os.getpid(), os.getppid(), os.getsid(0), os.getpgid(0)


class Member:
    """One process of the ring."""

    def __init__(self, log, shared, place, processes, incoming, onward):
        self.log, self.shared, self.place, self.processes = log, shared, place, processes
        self.incoming, self.onward = incoming, onward
        self.memory = bytearray(PRIVATE_PAGES * PAGE)
        self.stamps = [0] * PRIVATE_PAGES
        self.identity = identity()
        self.turn = 0

    def run(self):
        last = 0
        while True:
            last = self.step(last)

    def step(self, last):
        received = os.read(self.incoming, 8)
        if len(received) != 8:
            os._exit(0)
        (number,) = NUMBER.unpack(received)
        if last and number <= last:
            fail(self.log, f"{self.place} got {number} after {last}")
        if identity() != self.identity:
            fail(self.log, f"{self.place} was {self.identity} and is {identity()}")
        page = self.turn % PRIVATE_PAGES
        at = page * PAGE + 8 * (self.turn % 500)
        if NUMBER.unpack_from(self.memory, page * PAGE + 4088)[0] != self.stamps[page]:
            fail(self.log, f"{self.place}: page {page} is not as it was written")
        self.stamps[page] = number
        NUMBER.pack_into(self.memory, page * PAGE + 4088, number)
        NUMBER.pack_into(self.memory, at, number)
        before = (self.place - 1) % self.processes
        (written,) = NUMBER.unpack_from(self.shared, before * PAGE)
        if written and number > self.processes and written != number - 1:
            fail(self.log, f"{self.place} has {number}, and the one before it wrote {written}")
        NUMBER.pack_into(self.shared, self.place * PAGE, number)
        os.write(self.onward, NUMBER.pack(number + 1))
        self.turn += 1
        return number


def answer(log, sock):
    wanted = 1
    me = os.getpid(), os.getsid(0), os.getpgid(0)
    while True:
        message = sock.recv(64)
        if not message:
            os._exit(0)
        if message != NUMBER.pack(wanted) or (os.getpid(), os.getsid(0), os.getpgid(0)) != me or os.getppid() != 1:
            fail(log, f"the grandchild got {message!r} where {wanted} was due, or is another")
        wanted += 1
        sock.send(NUMBER.pack(wanted))


def fail(log, what):
    log.write(f"MISMATCH {what}\n")
    os._exit(1)


main()
