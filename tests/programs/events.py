"""Holds epolls, inotifies and pidfds, and checks them: `events.py LOG DIRECTORY`."""

import ctypes
import os
import queue
import select
import signal
import socket
import struct
import sys
import threading
import time

from holding import Held, expect, fdinfo, run

directory = sys.argv[2]
libc = ctypes.CDLL(None, use_errno=True)


def path(name):
    return os.path.join(directory, name)


class Epoll(Held):
    """By level and by edge, one-shot before and after its event, nested, and of what has another number now."""

    def __init__(self):
        self.epoll = select.epoll()
        self.pairs = [socket.socketpair() for _ in range(5)]
        self.level, self.edge, self.armed, self.fired, self.moved = [one.fileno() for one, _ in self.pairs]
        self.epoll.register(self.level, select.EPOLLIN)
        self.epoll.register(self.edge, select.EPOLLIN | select.EPOLLET)
        self.epoll.register(self.armed, select.EPOLLIN | select.EPOLLONESHOT)
        self.epoll.register(self.fired, select.EPOLLIN | select.EPOLLONESHOT)
        self.pairs[3][1].send(b"x")
        expect(self.epoll.poll(5), [(self.fired, select.EPOLLIN)], "the event of the one that is armed once")
        # A read end that is empty, disarmed.
        self.reader, self.writer = os.pipe()
        self.epoll.register(self.reader, select.EPOLLIN | select.EPOLLONESHOT)
        os.write(self.writer, b"x")
        expect(self.epoll.poll(5), [(self.reader, select.EPOLLIN)], "the event of the pipe")
        os.read(self.reader, 1)
        # Registered under a number that is closed, and the description lives on under another.
        first = os.dup(self.moved)
        self.epoll.register(first, select.EPOLLIN)
        self.first = first
        os.close(first)
        self.outer = select.epoll()
        self.outer.register(self.epoll.fileno(), select.EPOLLIN)

    def check(self):
        expect(self.outer.poll(0), [], "events where there are none")
        expect(self.epoll.poll(0), [], "events where there are none")
        told = {int(line[0]): int(line[2], 16) for line in fdinfo(self.epoll.fileno(), "tfd")}
        expect(told[self.fired], select.EPOLLONESHOT, "the one that had its event")
        expect(told[self.armed] & select.EPOLLIN, select.EPOLLIN, "the one that waits for its event")
        for place, number in [(0, self.level), (1, self.edge), (4, self.first)]:
            one, other = self.pairs[place]
            other.send(b"y")
            expect(self.outer.poll(5), [(self.epoll.fileno(), select.EPOLLIN)], "the outer epoll")
            expect(self.epoll.poll(5), [(number, select.EPOLLIN)], f"the event of pair {place}")
            if place == 1:
                expect(self.epoll.poll(0), [], "a second event for one edge")
            expect(one.recv(10), b"y", "the data")

    def drain(self):
        os.write(self.writer, b"z")
        expect(self.epoll.poll(0), [], "an event of the pipe, which is disarmed")
        self.epoll.modify(self.reader, select.EPOLLIN | select.EPOLLONESHOT)
        expect(self.epoll.poll(5), [(self.reader, select.EPOLLIN)], "the event of the pipe")
        os.read(self.reader, 1)
        self.pairs[2][1].send(b"once")
        expect(self.epoll.poll(5), [(self.armed, select.EPOLLIN)], "the event that was waited for")
        expect(self.epoll.poll(0), [], "a second one")
        self.pairs[2][0].recv(10)
        self.epoll.modify(self.armed, select.EPOLLIN | select.EPOLLONESHOT)
        self.epoll.modify(self.fired, select.EPOLLIN | select.EPOLLONESHOT)
        expect(self.epoll.poll(5), [(self.fired, select.EPOLLIN)], "the event after it was armed again")


IN_CREATE, IN_MODIFY, IN_DELETE = 0x100, 0x2, 0x200


class Inotify(Held):
    """Watches with gaps in their numbers."""

    def __init__(self):
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watches = {}
        for number in range(6):
            os.mkdir(path(f"watched-{number}"))
            mask = IN_CREATE | IN_DELETE
            self.watches[libc.inotify_add_watch(self.fd, path(f"watched-{number}").encode(), mask)] = number
        for watch in list(self.watches)[::2]:
            libc.inotify_rm_watch(self.fd, watch)
            del self.watches[watch]
        self.read()

    def read(self):
        try:
            data = os.read(self.fd, 4096)
        except BlockingIOError:
            return []
        events = []
        while data:
            watch, mask, _, length = struct.unpack_from("iIII", data)
            events.append((watch, mask, data[16 : 16 + length].rstrip(b"\0")))
            data = data[16 + length :]
        return events

    def check(self):
        expect(self.read(), [], "events where there are none")
        for watch, number in self.watches.items():
            open(path(f"watched-{number}/new"), "w").close()
            os.unlink(path(f"watched-{number}/new"))
            expect(self.read(), [(watch, IN_CREATE, b"new"), (watch, IN_DELETE, b"new")], "the events")


class Pidfd(Held):
    """Of a child, of a zombie, of this process, and of one that was collected."""

    def __init__(self):
        self.child = os.fork()
        if self.child == 0:
            while True:
                signal.pause()
        self.zombie = os.fork()
        if self.zombie == 0:
            os._exit(5)
        gone = os.fork()
        if gone == 0:
            os._exit(0)
        self.held = {pid: os.pidfd_open(pid) for pid in (self.child, self.zombie, os.getpid())}
        self.gone = os.pidfd_open(gone)
        os.waitpid(gone, 0)
        os.waitid(os.P_PID, self.zombie, os.WEXITED | os.WNOWAIT)

    def check(self):
        for pid, fd in self.held.items():
            expect(fdinfo(fd, "Pid"), [[str(pid)]], "the pid that the kernel tells")
        signal.pidfd_send_signal(self.held[self.child], 0)
        expect(bool(select.select([self.held[self.zombie]], [], [], 0)[0]), True, "the zombie's end")
        expect(bool(select.select([self.held[self.child]], [], [], 0)[0]), False, "the child's end")
        try:
            signal.pidfd_send_signal(self.gone, 0)
            raise AssertionError("one that is gone can be signalled")
        except ProcessLookupError:
            pass
        result = os.waitid(os.P_PIDFD, self.held[self.zombie], os.WEXITED | os.WNOWAIT)
        expect((result.si_pid, result.si_status), (self.zombie, 5), "the zombie's status")


class Signalfd(Held):
    """A signal that waits to be read, with what was sent along."""

    def __init__(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN + 3})
        mask = struct.pack("<Q", 1 << (signal.SIGRTMIN + 2))
        self.fd = libc.signalfd(-1, mask + bytes(120), os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "signalfd")
        self.number = 0
        self.send()

    def send(self):
        self.number += 1
        if libc.sigqueue(os.getpid(), signal.SIGRTMIN + 3, ctypes.c_void_p(self.number)):
            raise OSError(ctypes.get_errno(), "sigqueue")

    def check(self):
        expect(fdinfo(self.fd, "sigmask"), [[f"{1 << (signal.SIGRTMIN + 2):016x}"]], "the signals of the signalfd")
        expect(bool(select.select([self.fd], [], [], 0)[0]), True, "the signal that waits")

    def drain(self):
        told = os.read(self.fd, 1000)
        expect(len(told), 128, "the bytes of one signal")
        number, _, code, pid, _ = struct.unpack_from("<IiiII", told)
        value = struct.unpack_from("<i", told, 44)[0]
        expect((number, code, pid, value), (signal.SIGRTMIN + 3, -1, os.getpid(), self.number), "the signal")
        self.send()


class ThreadSignal(Held):
    """A signal from tgkill(2) that waits for a thread which is not the first, and blocks it."""

    def __init__(self):
        self.asked, self.answers = queue.Queue(), queue.Queue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()
        self.answers.get()
        signal.pthread_kill(self.thread.ident, signal.SIGUSR1)

    def work(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        self.answers.put(None)
        while True:
            self.answers.put(self.asked.get()())

    def do(self, work):
        self.asked.put(work)
        return self.answers.get()

    def check(self):
        # Of what waits for the process, Signalfd has one.
        of_process = {signal.SIGRTMIN + 3}
        expect(self.do(signal.sigpending) - of_process, {signal.SIGUSR1}, "the signal that waits for a thread")
        expect(signal.sigpending() - of_process, set(), "what waits for the first thread")

    def drain(self):
        found = self.do(lambda: signal.sigtimedwait({signal.SIGUSR1}, 0))
        expect((found.si_signo, found.si_pid), (signal.SIGUSR1, os.getpid()), "that signal")
        signal.pthread_kill(self.thread.ident, signal.SIGUSR1)


def call(*arguments):
    result = libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {arguments[0]}")
    return result


SYS_TIMER_CREATE, SYS_TIMER_SETTIME, SYS_TIMER_GETOVERRUN = 222, 223, 225
TIMER_ABSTIME = 1
SIGEV_THREAD_ID = 4


class Overruns(Held):
    """A timer that tells how often it was missed when its signal was taken last."""

    def __init__(self):
        mine = signal.SIGRTMIN + 5
        signal.pthread_sigmask(signal.SIG_BLOCK, {mine})
        self.id = ctypes.c_int()
        event = struct.pack("<qii48x", 0, mine, 0)
        call(SYS_TIMER_CREATE, time.CLOCK_MONOTONIC, event, ctypes.byref(self.id))
        # Due for the first time three and a half intervals ago, and not again while this runs.
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        interval = now // 4
        first = now - 3 * interval - interval // 2
        spec = struct.pack("<4q", *divmod(interval, 10**9), *divmod(first, 10**9))
        call(SYS_TIMER_SETTIME, self.id, TIMER_ABSTIME, spec, None)
        signal.sigwait({mine})
        self.until = now + interval // 2
        expect(self.told(), 3, "the overruns at first")

    def told(self):
        return call(SYS_TIMER_GETOVERRUN, self.id)

    def check(self):
        if time.clock_gettime_ns(time.CLOCK_MONOTONIC) < self.until:
            expect(self.told(), 3, "the overruns")


class ThreadTimer(ThreadSignal):
    """A timer that expires all the time, and tells a thread which is not the first, and blocks its signal."""

    def __init__(self):
        self.mine = signal.SIGRTMIN + 6
        super().__init__()
        timer = ctypes.c_int()
        event = struct.pack("<qiii44x", 0, self.mine, SIGEV_THREAD_ID, self.thread.native_id)
        call(SYS_TIMER_CREATE, time.CLOCK_MONOTONIC, event, ctypes.byref(timer))
        interval = 0, 10_000_000
        call(SYS_TIMER_SETTIME, timer, 0, struct.pack("<4q", *interval, *interval), None)

    def work(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, {self.mine})
        super().work()

    def check(self):
        # What is there may be from before: the one after it shows that the timer goes on.
        for _ in range(2):
            found = self.do(lambda: signal.sigtimedwait({self.mine}, 20))
            expect(found and found.si_signo, self.mine, "the timer's signal")


def main():
    os.makedirs(directory)
    # The signal of the first one is blocked before there is another thread, which it could reach.
    run([Overruns(), Epoll(), Inotify(), Pidfd(), Signalfd(), ThreadSignal(), ThreadTimer()])


main()
