"""Threads that choose their processors, and others that make threads all the time, each for a moment.

One thread is called `first` (it chose CPU 0), one `second` (CPU 1), one `heir` (made by `second`), and one `free`. At SIGUSR1 `free`
chooses CPU 1, at SIGUSR2 all processors. What each is allowed is looked at from outside.
"""

import ctypes
import os
import queue
import signal
import sys
import threading
import time

LIBC = ctypes.CDLL(None)
PR_SET_NAME = 15
ALL = os.sched_getaffinity(0)
wishes = queue.Queue()


def called(name):
    LIBC.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def stays(name, cpus=None, then=None):
    called(name)
    if cpus:
        os.sched_setaffinity(0, cpus)
    if then:
        then()
    while True:
        time.sleep(1)


def free():
    called("free")
    while True:
        os.sched_setaffinity(0, wishes.get())


def makes():
    called("maker")
    while True:
        threads = [threading.Thread(target=time.sleep, args=(0.002,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def start(target, *args):
    threading.Thread(target=target, args=args, daemon=True).start()


# Before there are threads: otherwise one of them may have the signal.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
start(stays, "first", {0})
start(stays, "second", {1}, lambda: start(stays, "heir"))
start(free)
for _ in range(int(sys.argv[1])):
    start(stays, "many")
start(makes)
while True:
    told = signal.sigwait({signal.SIGUSR1, signal.SIGUSR2})
    wishes.put({1} if told == signal.SIGUSR1 else ALL)
