"""Holds what can't be brought to another copy of its directory, and goes on.

usage: refused_in_volume.py LOG DIRECTORY
"""

import ctypes
import os
import socket
import sys
import time

log_path, directory = sys.argv[1:3]
log = open(log_path, "a", buffering=1)
os.chdir(directory)
bound = socket.socket(socket.AF_UNIX)
bound.bind("bound")
bound.listen()
os.mkfifo("fifo")
fifo = os.open("fifo", os.O_RDWR)
libc = ctypes.CDLL(None)
watching = libc.inotify_init1(0)
assert libc.inotify_add_watch(watching, b"fifo", 2) == 1
number = 0
while True:
    number += 1
    log.write(f"round={number}\n")
    time.sleep(0.005)
