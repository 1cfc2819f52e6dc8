"""Processes that check what they have in their IPC and UTS namespaces: `ipc.py LOG [undo|queue]`.

With `undo`, a semaphore operation is made that the kernel takes back at the end; with `queue`, a POSIX message queue.
"""

import ctypes
import os
import socket
import struct
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmdt.argtypes = [ctypes.c_void_p]
libc.msgrcv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long, ctypes.c_int]
CREATE, REMOVE, SET, STAT, GETALL, SETALL, UNDO = 0o1000, 0, 1, 2, 13, 17, 0x1000
OWNER = 1234, 1235
PAGE, PAGES = 4096, 16
KEY = 0x7E57


def checked(result, what):
    if result is None or result in (-1, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), what)
    return result


class Segment:
    """Shared memory in which every page has a number."""

    def __init__(self, key, attached=True, removed=False):
        self.attached, self.turn = attached, 0
        self.id = checked(libc.shmget(key, PAGES * PAGE - 100, CREATE | 0o640), "shmget")
        self.at = self.attach()
        self.write()
        # As `struct shmid_ds` has them: the owner is behind the key.
        about = ctypes.create_string_buffer(256)
        checked(libc.shmctl(self.id, STAT, about), "IPC_STAT")
        struct.pack_into("II", about, 4, *OWNER)
        checked(libc.shmctl(self.id, SET, about), "IPC_SET")
        if removed:
            checked(libc.shmctl(self.id, REMOVE, None), "IPC_RMID")
        self.access = ["1640" if removed else "640", *map(str, OWNER)]
        if not attached:
            checked(libc.shmdt(self.at), "shmdt")

    def attach(self):
        return checked(libc.shmat(self.id, None, 0), "shmat")

    def has_its_access(self):
        """Whether its mode and its owner are as they were set."""
        with open("/proc/sysvipc/shm") as file:
            lines = [line.split() for line in file]
        return [[line[2], *line[7:9]] for line in lines if line[1] == str(self.id)] == [self.access]

    def write(self):
        self.turn += 1
        for page in range(PAGES):
            ctypes.c_uint64.from_address(self.at + page * PAGE).value = self.turn * 100 + page

    def check(self):
        if not self.attached:
            self.at = self.attach()
        found = [ctypes.c_uint64.from_address(self.at + page * PAGE).value for page in range(PAGES)]
        right = found == [self.turn * 100 + page for page in range(PAGES)]
        self.write()
        if not self.attached:
            checked(libc.shmdt(self.at), "shmdt")
        return right


def semaphores(identity):
    values = (ctypes.c_ushort * 3)()
    checked(libc.semctl(identity, 0, GETALL, values), "GETALL")
    return list(values)


def operate(identity, number, change, flags=0):
    operation = struct.pack("<Hhh", number, change, flags)
    checked(libc.semop(identity, operation, 1), "semop")


def send(queue, kind, text):
    message = struct.pack("<q", kind) + text
    checked(libc.msgsnd(queue, message, len(text), 0), "msgsnd")


def receive(queue):
    buffer = ctypes.create_string_buffer(264)
    length = checked(libc.msgrcv(queue, buffer, 256, 0, 0), "msgrcv")
    return struct.unpack_from("<q", buffer.raw)[0], buffer.raw[8 : 8 + length]


def main():
    log = open(sys.argv[1], "a", buffering=1)

    def fail(what):
        log.write(f"MISMATCH {what}\n")
        os._exit(1)

    segments = [Segment(KEY), Segment(0, removed=True), Segment(KEY + 1, attached=False)]
    counters = Segment(KEY + 2)
    sets = [checked(libc.semget(KEY, 3, CREATE | 0o600), "semget") for _ in range(2)]
    bell = checked(libc.semget(KEY + 1, 3, CREATE | 0o600), "semget")
    queue = checked(libc.msgget(KEY, CREATE | 0o600), "msgget")
    for number in range(5):
        send(queue, number + 1, b"message %d" % number)
    if sys.argv[2:] == ["undo"]:
        operate(sets[0], 2, 1, UNDO)
    if sys.argv[2:] == ["queue"]:
        os.close(checked(ctypes.CDLL("librt.so.1").mq_open(b"/rswap", os.O_CREAT | os.O_RDWR, 0o600, None), "mq_open"))
    if os.fork() == 0:
        # Counts in shared memory each time that the bell rings.
        while True:
            operate(bell, 0, -1)
            ctypes.c_uint64.from_address(counters.at + 8).value += 1
            operate(bell, 1, 1)
    value, rung, next_message = 0, 0, 5
    while True:
        name = f"name-{value}"
        domain = f"domain-{value}".encode()
        socket.sethostname(name)
        checked(libc.setdomainname(domain, len(domain)), "setdomainname")
        operate(sets[0], 1, 1)
        value += 1
        for _ in range(5):
            for segment in segments:
                if not segment.check():
                    fail(f"segment {segment.id} is not as it was written")
                if not segment.has_its_access():
                    fail(f"segment {segment.id} has not the access {segment.access}")
            if checked(libc.shmget(KEY, 0, 0), "shmget") != segments[0].id:
                fail("the key leads to another segment")
            if semaphores(sets[0])[1] != value or sets[0] != checked(libc.semget(KEY, 3, 0), "semget"):
                fail(f"the semaphores are {semaphores(sets[0])} where {value} was due")
            if receive(queue) != (next_message - 4, b"message %d" % (next_message - 5)):
                fail("a message is not the next one")
            send(queue, next_message + 1, b"message %d" % next_message)
            next_message += 1
            if socket.gethostname() != name:
                fail(f"the host name is {socket.gethostname()} and was {name}")
            found = ctypes.create_string_buffer(65)
            checked(libc.getdomainname(found, len(found)), "getdomainname")
            if found.value != domain:
                fail(f"the domain name is {found.value} and was {domain}")
            operate(bell, 0, 1)
            operate(bell, 1, -1)
            rung += 1
            if ctypes.c_uint64.from_address(counters.at + 8).value != rung:
                fail("the other process counts in other memory")
            time.sleep(0.01)
        log.write(f"checked={value}\n")


main()
