"""Holds files of all kinds, and checks them: `files.py LOG DIRECTORY`."""

import fcntl
import os
import signal
import socket
import struct
import sys
import time

from holding import Held, by_child, expect, fdinfo, flags, run

directory = sys.argv[2]


def path(name):
    return os.path.join(directory, name)


class Appended(Held):
    """Two descriptions of one file, one of which appends, and a duplicate that shares its offset."""

    def __init__(self):
        self.writer = os.open(path("appended"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.reader = os.open(path("appended"), os.O_RDONLY)
        self.twin = os.dup(self.reader)
        self.lines = 0

    def check(self):
        line = b"%9d\n" % self.lines
        os.write(self.writer, line)
        expect(os.read(self.twin if self.lines % 2 else self.reader, 10), line, "the next line")
        expect(os.lseek(self.reader, 0, os.SEEK_CUR), os.lseek(self.twin, 0, os.SEEK_CUR), "the shared offset")
        expect(flags(self.writer) & os.O_APPEND, os.O_APPEND, "O_APPEND")
        self.lines += 1


class Paths(Held):
    """O_PATH: of a file, a directory, a symbolic link and a FIFO."""

    def __init__(self):
        os.symlink("nowhere", path("link"))
        os.mkfifo(path("unopened"))
        wanted = {"appended": 0, ".": os.O_DIRECTORY, "link": os.O_NOFOLLOW, "unopened": 0}
        self.held = {os.open(path(name), os.O_PATH | more): name for name, more in wanted.items()}

    def check(self):
        for fd, name in self.held.items():
            expect(os.path.samestat(os.fstat(fd), os.lstat(path(name))), True, f"the file behind O_PATH of {name}")
            expect(flags(fd) & os.O_PATH, os.O_PATH, "O_PATH")


class Directory(Held):
    """A directory of which half of the entries were read."""

    def __init__(self):
        os.mkdir(path("many"))
        for number in range(2000):
            open(path(f"many/{number}"), "w").close()
        self.entries = None

    def begin(self):
        self.entries = os.scandir(path("many"))
        self.seen = {next(self.entries).name for _ in range(10)}

    def drain(self):
        if self.entries:
            names = [entry.name for entry in self.entries]
            expect(len(names) + len(self.seen), 2000, "the number of entries")
            expect(set(names) | self.seen, {str(n) for n in range(2000)}, "the entries")
        self.begin()


class Deleted(Held):
    """A deleted file with two descriptions, one without a name from the beginning, and memory with seals."""

    def __init__(self):
        self.writer = os.open(path("deleted"), os.O_RDWR | os.O_CREAT, 0o640)
        self.reader = os.open(path("deleted"), os.O_RDONLY)
        os.unlink(path("deleted"))
        # Another one takes the name.
        open(path("deleted"), "w").close()
        self.unnamed = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.write(self.unnamed, b"unnamed")
        self.memory = os.memfd_create("rswap-test", os.MFD_ALLOW_SEALING)
        os.write(self.memory, b"memory" * 1000)
        fcntl.fcntl(self.memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.memory_again = os.open(f"/proc/self/fd/{self.memory}", os.O_RDONLY)
        self.written = 0

    def check(self):
        data = b"%9d\n" % self.written
        expect(os.write(self.writer, data), 10, "bytes written")
        expect(os.pread(self.reader, 10, 10 * self.written), data, "the other description's view")
        self.written += 1
        stat = os.fstat(self.writer)
        expect((stat.st_nlink, stat.st_size, stat.st_mode & 0o777), (0, 10 * self.written, 0o640), "the deleted file")
        expect(os.stat(path("deleted")).st_size, 0, "the file that took the name")
        expect(os.pread(self.unnamed, 100, 0), b"unnamed", "the unnamed file")
        expect(os.lseek(self.unnamed, 0, os.SEEK_CUR), 7, "its offset")
        expect(os.fstat(self.unnamed).st_nlink, 0, "its links")
        expect(os.pread(self.memory_again, 10000, 0), b"memory" * 1000, "the memory")
        expect(fcntl.fcntl(self.memory, fcntl.F_GET_SEALS), fcntl.F_SEAL_SHRINK, "its seals")
        expect(os.readlink(f"/proc/self/fd/{self.memory}"), "/memfd:rswap-test (deleted)", "its name")
        expect(sorted(os.listdir(directory)), self.names(), "the names in the directory")

    def names(self):
        if not hasattr(self, "listed"):
            self.listed = sorted(os.listdir(directory))
        return self.listed


class Fifo(Held):
    """A FIFO with both ends, and one that is opened for both."""

    def __init__(self):
        os.mkfifo(path("fifo"))
        os.mkfifo(path("both"))
        self.reader = os.open(path("fifo"), os.O_RDONLY | os.O_NONBLOCK)
        self.writer = os.open(path("fifo"), os.O_WRONLY)
        self.both = os.open(path("both"), os.O_RDWR)
        fcntl.fcntl(self.reader, fcntl.F_SETPIPE_SZ, 1 << 17)
        self.number = 0
        self.fill()

    def data(self):
        return b"%07d;" % self.number * 10000

    def fill(self):
        os.write(self.writer, self.data())
        os.write(self.both, self.data()[:800])

    def check(self):
        expect(fcntl.fcntl(self.writer, fcntl.F_GETPIPE_SZ), 1 << 17, "the FIFO's size")
        expect(flags(self.reader) & os.O_NONBLOCK, os.O_NONBLOCK, "O_NONBLOCK")
        expect(flags(self.writer) & os.O_NONBLOCK, 0, "O_NONBLOCK of the writer")

    def drain(self):
        expect(os.read(self.reader, 1 << 17), self.data(), "what was in the FIFO")
        expect(os.read(self.both, 1 << 17), self.data()[:800], "what was in the other")
        self.number += 1
        self.fill()


class Pipe(Held):
    """A pipe of another size than usual, nearly full; a child holds its second read end."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        self.again = os.open(f"/proc/self/fd/{self.reader}", os.O_RDONLY)
        fcntl.fcntl(self.reader, fcntl.F_SETPIPE_SZ, 1 << 18)
        os.set_inheritable(self.writer, True)
        self.number = 0
        os.write(self.writer, self.data())

    def data(self):
        return b"%07d;" % self.number * 30000

    def check(self):
        kept = [os.get_inheritable(fd) for fd in (self.reader, self.writer, self.again)]
        expect(kept, [False, True, False], "what an execve keeps")

    def drain(self):
        expect(fcntl.fcntl(self.writer, fcntl.F_GETPIPE_SZ), 1 << 18, "the pipe's size")
        found = b""
        while len(found) < len(self.data()):
            found += os.read(self.again if self.number % 2 else self.reader, 1 << 18)
        expect(found, self.data(), "what was in the pipe")
        self.number += 1
        os.write(self.writer, self.data())


class Devices(Held):
    def __init__(self):
        self.held = {name: os.open(f"/dev/{name}", os.O_RDWR) for name in ("null", "zero", "full", "random", "urandom")}

    def check(self):
        expect(os.read(self.held["null"], 1), b"", "/dev/null")
        expect(os.read(self.held["zero"], 2), b"\0\0", "/dev/zero")
        expect(os.read(self.held["full"], 2), b"\0\0", "/dev/full")
        expect(len(os.read(self.held["random"], 8)), 8, "/dev/random")
        expect(len(os.read(self.held["urandom"], 8)), 8, "/dev/urandom")


F_OFD_SETLK = 37


def flock_struct(kind, start, length):
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)


class Locks(Held):
    """flock(2), locks of this process and of a description, shared and exclusive. Others find them taken."""

    def __init__(self):
        def make(name):
            return os.open(path(name), os.O_RDWR | os.O_CREAT)

        self.whole, self.process, self.description = make("whole"), make("process"), make("description")
        self.shared = make("shared")
        fcntl.flock(self.whole, fcntl.LOCK_EX)
        fcntl.flock(self.shared, fcntl.LOCK_SH)
        # Shared ones: both hosts see this file, and an exclusive one stays in the other's way.
        fcntl.lockf(self.process, fcntl.LOCK_SH, 100, 50)
        fcntl.lockf(self.process, fcntl.LOCK_SH, 10, 300)
        fcntl.fcntl(self.description, F_OFD_SETLK, flock_struct(fcntl.F_WRLCK, 7, 0))
        self.told = self.tell()

    def tell(self):
        held = (self.whole, self.process, self.description, self.shared)
        # Without the number, the pid of a lock without one, and the file.
        return [sorted((line[1], line[3], line[6], line[7]) for line in fdinfo(fd, "lock")) for fd in held]

    def check(self):
        expect(self.tell(), self.told, "what the kernel tells of the locks")
        expect(by_child(self.find_taken), 0, "what a child finds of the locks")

    def find_taken(self):
        def taken(name, lock):
            fd = os.open(path(name), os.O_RDWR)
            try:
                lock(fd)
                return False
            except BlockingIOError:
                return True

        now = fcntl.LOCK_NB
        answers = [
            taken("whole", lambda fd: fcntl.flock(fd, fcntl.LOCK_SH | now)),
            not taken("shared", lambda fd: fcntl.flock(fd, fcntl.LOCK_SH | now)),
            taken("shared", lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | now)),
            not taken("process", lambda fd: fcntl.lockf(fd, fcntl.LOCK_SH | now, 1, 49)),
            taken("process", lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | now, 1, 149)),
            not taken("process", lambda fd: fcntl.lockf(fd, fcntl.LOCK_SH | now, 1, 305)),
            taken("process", lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | now, 1, 305)),
            taken("description", lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | now, 1, 1 << 40)),
            not taken("description", lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | now, 1, 6)),
        ]
        # A bit for each that is not as it should be.
        return sum(1 << place for place, right in enumerate(answers) if not right) % 98


class Signals(Held):
    """A socket that sends a signal of choice to this process when data comes, and one to the thread."""

    SIGNAL = signal.SIGRTMIN + 3

    def __init__(self):
        self.got = 0
        signal.signal(self.SIGNAL, self.count)
        self.one, self.other = socket.socketpair()
        fd = self.one.fileno()
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, 10, self.SIGNAL)  # F_SETSIG
        fcntl.fcntl(fd, fcntl.F_SETFL, flags(fd) | os.O_ASYNC)

    def count(self, *_):
        self.got += 1

    def check(self):
        fd = self.one.fileno()
        expect(fcntl.fcntl(fd, fcntl.F_GETOWN), os.getpid(), "F_GETOWN")
        expect(fcntl.fcntl(fd, 11), self.SIGNAL, "F_GETSIG")
        before = self.got
        self.other.send(b"x")
        deadline = time.monotonic() + 20
        while self.got == before and time.monotonic() < deadline:
            time.sleep(0.001)
        expect(self.got > before, True, "a signal came")
        expect(self.one.recv(10), b"x", "the data")


class Intervals(Held):
    """Interval timers: one that expires all the time, and two that are far from it."""

    def __init__(self):
        self.ticks = 0
        signal.signal(signal.SIGALRM, self.count)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        signal.setitimer(signal.ITIMER_VIRTUAL, 1000, 2000)
        signal.setitimer(signal.ITIMER_PROF, 3000, 4000)

    def count(self, *_):
        self.ticks += 1

    def check(self):
        before, deadline = self.ticks, time.monotonic() + 20
        while self.ticks == before and time.monotonic() < deadline:
            time.sleep(0.001)
        expect(self.ticks > before, True, "SIGALRM came")
        which = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
        expect([signal.getitimer(one)[1] for one in which], [0.05, 2000, 4000], "the intervals")
        left = [signal.getitimer(one)[0] for one in which[1:]]
        expect(800 < left[0] < 1001 and 2800 < left[1] < 3001, True, f"what is left: {left}")


class Events(Held):
    """A count that needs more than 32 bits, and a semaphore."""

    COUNT = (1 << 33) + 5

    def __init__(self):
        self.plain = os.eventfd(0)
        os.eventfd_write(self.plain, self.COUNT)
        self.semaphore = os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)

    def check(self):
        expect(os.eventfd_read(self.plain), self.COUNT, "the count")
        os.eventfd_write(self.plain, self.COUNT)
        expect(os.eventfd_read(self.semaphore), 1, "one of the semaphore")
        os.eventfd_write(self.semaphore, 1)
        expect(fdinfo(self.semaphore, "eventfd-count"), [["3"]], "the semaphore's count")


def main():
    os.makedirs(directory)
    held = [Appended(), Paths(), Directory(), Deleted(), Fifo(), Pipe(), Devices(), Locks(), Signals()]
    held += [Intervals(), Events()]
    run(held)


main()
