"""Waits in calls that Linux never goes on with after a stop (signal(7)): `waits.py LOG`.

A process for each call, with and without a limit of time. With one, each interruption returns EINTR (`NAME=` in the log), and
the call is made again. Without one, it returns only with what it waits for, which the first process sends when LOG.wake exists
(`woken=NAME`).
"""

import ctypes
import errno
import os
import signal
import socket
import sys
import time

log_path = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
LIMIT_S = 600
IPC_PRIVATE, IPC_CREAT = 0, 0o1000
events = ctypes.create_string_buffer(64)


class Timespec(ctypes.Structure):
    _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]


class Message(ctypes.Structure):
    _fields_ = [("name", ctypes.c_void_p), ("namelen", ctypes.c_uint), ("iov", ctypes.c_void_p), ("iovlen", ctypes.c_size_t),
                ("control", ctypes.c_void_p), ("controllen", ctypes.c_size_t), ("flags", ctypes.c_int)]


def say(text):
    with open(log_path, "a", buffering=1) as log:
        log.write(text + "\n")


def span(limited):
    return ctypes.byref(Timespec(LIMIT_S, 0)) if limited else None


def set_limit(one, limited):
    if limited:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, LIMIT_S.to_bytes(8, "little") + bytes(8))


def epoll(call):
    """An epoll of a pipe."""

    def make(limited):
        import select

        reader, writer = os.pipe()
        poll = select.epoll()
        poll.register(reader, select.EPOLLIN)

        def wait():
            if call == "epoll_wait":
                return libc.epoll_wait(poll.fileno(), events, 1, LIMIT_S * 1000 if limited else -1)
            return libc.epoll_pwait2(poll.fileno(), events, 1, span(limited), None)

        return wait, lambda pid: os.write(writer, b"x"), 1

    return make


def sigtimedwait(limited):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    wanted = (ctypes.c_ulong * 16)(1 << (signal.SIGUSR1 - 1))
    return (lambda: libc.sigtimedwait(wanted, None, span(limited)),
            lambda pid: os.kill(pid, signal.SIGUSR1), signal.SIGUSR1)


def semtimedop(limited):
    semaphore = libc.semget(IPC_PRIVATE, 1, IPC_CREAT | 0o600)

    def operate(change, limited):
        operation = (ctypes.c_short * 3)(0, change, 0)
        return libc.semtimedop(semaphore, operation, 1, span(limited))

    return lambda: operate(-1, limited), lambda pid: operate(1, False), 0


def recvmsg(limited):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    set_limit(ours, limited)
    place = (ctypes.c_void_p * 2)(ctypes.addressof(events), len(events))
    message = Message(iov=ctypes.addressof(place), iovlen=1)
    return lambda: libc.recvmsg(ours.fileno(), ctypes.byref(message), 0), lambda pid: theirs.send(b"1234567"), 7


def accept(limited):
    listener = socket.create_server(("127.0.0.1", 0))
    set_limit(listener, limited)

    def wait():
        accepted = libc.accept(listener.fileno(), None, None)
        return accepted if accepted < 0 else 0

    def wake(pid):
        socket.create_connection(listener.getsockname()).close()

    return wait, wake, 0


CALLS = {"epoll_wait": epoll("epoll_wait"), "epoll_pwait2": epoll("epoll_pwait2"), "sigtimedwait": sigtimedwait,
         "semtimedop": semtimedop, "recvmsg": recvmsg, "accept": accept}


def work(name, wait, limited, wanted):
    began = time.monotonic()
    interrupted = 0
    while True:
        result = wait()
        if result >= 0:
            say(f"woken={name}" if result == wanted else f"MISMATCH: {name} returned {result}, not {wanted}")
            os._exit(0)
        error = ctypes.get_errno()
        if error != errno.EINTR or not limited:
            say(f"MISMATCH: {name} {'with' if limited else 'without'} a limit returned {errno.errorcode.get(error, error)} "
                f"after {time.monotonic() - began:.1f} s")
            os._exit(1)
        interrupted += 1
        say(f"{name}={interrupted}")


wakers = []
for name, make in CALLS.items():
    for limited in (True, False):
        wait, wake, wanted = make(limited)
        pid = os.fork()
        if pid == 0:
            work(name, wait, limited, wanted)
        wakers.append((pid, wake))
time.sleep(0.3)
say("waiting=1")
while not os.path.exists(log_path + ".wake"):
    time.sleep(0.05)
for pid, wake in wakers:
    wake(pid)
for pid, _ in wakers:
    if os.waitpid(pid, 0)[1] != 0:
        say(f"MISMATCH: process {pid} has failed")
say("done=1")
