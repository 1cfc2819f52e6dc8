"""Processes and threads that have descriptors or directories in common, or of their own: `tables.py LOG DIRECTORY`.

The first process changes what they have in common, and asks each of the others what it sees. It logs `checked=N`.
"""

import ctypes
import os
import queue
import sys
import threading

from holding import Held, expect, run

libc = ctypes.CDLL(None, use_errno=True)
CLONE, UNSHARE = 56, 272
CLONE_FS, CLONE_FILES, SIGCHLD = 0x200, 0x400, 17
directory = sys.argv[2]


def call(number, *arguments):
    result = libc.syscall(number, *[ctypes.c_long(argument) for argument in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result


def target(fd):
    """What a descriptor of the calling thread is; None when it is closed."""
    try:
        return os.readlink(f"/proc/thread-self/fd/{fd}")
    except FileNotFoundError:
        return None


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def place():
    return os.getcwd(), umask()


class Process:
    """A process that was made with `flags`, and evaluates what it is told."""

    def __init__(self, flags):
        (told, self.told), (self.answers, answers) = os.pipe(), os.pipe()
        self.theirs = told, answers
        self.flags = flags
        self.pid = call(CLONE, flags | SIGCHLD, 0, 0, 0, 0)
        if self.pid == 0:
            while True:
                text = os.read(told, 1000)
                if not text:
                    os._exit(0)
                try:
                    answer = repr(eval(text.decode()))
                except BaseException as error:
                    answer = repr(f"{type(error).__name__}: {error}")
                os.write(answers, answer.encode())

    def do(self, text):
        os.write(self.told, text.encode())
        return eval(os.read(self.answers, 1000).decode())


class Thread:
    """A thread that has left the tables `flags` of whoever made it, and calls what it is given."""

    def __init__(self, flags, by=None):
        self.asked, self.answers = queue.Queue(), queue.Queue()
        start = threading.Thread(target=self.work, args=(flags,), daemon=True).start
        start() if by is None else by.do(start)
        self.answers.get()

    def work(self, flags):
        if flags:
            call(UNSHARE, flags)
        self.answers.put(None)
        while True:
            work = self.asked.get()
            try:
                self.answers.put(work())
            except BaseException as error:
                self.answers.put(f"{type(error).__name__}: {error}")

    def do(self, work):
        self.asked.put(work)
        return self.answers.get()


class Processes(Held):
    """Each has other tables in common with the first one; one has what another one has that has left the first's."""

    def __init__(self):
        self.files = Process(CLONE_FILES)
        self.places = Process(CLONE_FS)
        self.both = Process(CLONE_FILES | CLONE_FS)
        self.neither = Process(0)
        self.number = 0

    def check(self):
        self.number += 1
        os.chdir(f"{directory}/{self.number % 2}")
        os.umask(0o20 + self.number % 8)
        path = f"{directory}/file"
        fd = os.open(path, os.O_RDONLY | os.O_CREAT)
        for one in (self.files, self.places, self.both, self.neither):
            shared, beside = bool(one.flags & CLONE_FILES), bool(one.flags & CLONE_FS)
            expect(one.do(f"target({fd})"), path if shared else None, f"what process {one.flags:#x} sees of a file")
            expect(one.do("place()") == place(), beside, f"being where process {one.flags:#x} is")
        # Closed there, it is closed here; and the other way round.
        self.both.do(f"os.close({fd})")
        expect((target(fd), self.files.do(f"target({fd})")), (None, None), "what another process has closed")
        fd = self.files.do(f"os.open({path!r}, os.O_RDONLY)")
        expect(target(fd), path, "what another process has opened")
        os.close(fd)
        self.places.do(f"os.chdir({directory!r})")
        expect((os.getcwd(), self.both.do("os.getcwd()")), (directory, directory), "where another process went")


class Threads(Held):
    """Threads with descriptors and directories of their own, and threads that were made by those."""

    def __init__(self):
        self.files = Thread(CLONE_FILES)
        self.beside = Thread(0, self.files)
        self.place = Thread(CLONE_FS)
        self.there = Thread(CLONE_FILES, self.place)
        self.own = self.files.do(lambda: os.open(f"{directory}/own", os.O_RDWR | os.O_CREAT))
        self.pipe = self.files.do(os.pipe)
        self.files.do(lambda: os.write(self.pipe[1], b"kept in the thread's pipe"))
        os.makedirs(f"{directory}/root/inside")
        self.place.do(lambda: os.chdir(f"{directory}/root"))
        self.place.do(lambda: os.umask(0o70))

    def check(self):
        expect(target(self.own) == f"{directory}/own", False, "seeing another thread's file")
        for thread in (self.files, self.beside):
            expect(thread.do(lambda: target(self.own)), f"{directory}/own", "a file that two threads have")
        expect(self.there.do(lambda: target(self.own)) == f"{directory}/own", False, "seeing it from a third one")
        fd = self.beside.do(lambda: os.dup(self.own))
        expect(self.files.do(lambda: target(fd)), f"{directory}/own", "what one of them opened")
        expect(target(fd) == f"{directory}/own", False, "seeing what one of them opened")
        self.files.do(lambda: os.close(fd))
        for thread in (self.place, self.there):
            expect(thread.do(place), (f"{directory}/root", 0o70), "where two threads are")
        self.there.do(lambda: os.chdir("inside"))
        expect(self.place.do(os.getcwd), f"{directory}/root/inside", "where one of them went")
        self.place.do(lambda: os.chdir(".."))

    def drain(self):
        expect(self.files.do(lambda: os.read(self.pipe[0], 100)), b"kept in the thread's pipe", "a thread's pipe")
        self.beside.do(lambda: os.write(self.pipe[1], b"kept in the thread's pipe"))


def main():
    for name in ("0", "1"):
        os.makedirs(f"{directory}/{name}")
    # The processes first: each has one thread.
    run([Processes(), Threads()])


if __name__ == "__main__":
    main()
