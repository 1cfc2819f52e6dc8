"""Holds what a migration refuses: `refused.py LOG DIRECTORY OUTSIDE`. OUTSIDE is the name of somebody else's listening socket.

Logs `holds=NAMES`: of what this kernel has.
"""

import ctypes
import fcntl
import os
import signal
import socket
import sys

directory, outside = sys.argv[2:4]
libc = ctypes.CDLL(None, use_errno=True)
held = []
names = []


def call(number, *arguments):
    fd = libc.syscall(number, *arguments)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "refused by this kernel")
    return fd


def hold(name, make):
    try:
        held.append(make())
        names.append(name)
    except OSError as error:
        print(name, error)


def lease():
    fd = os.open(os.path.join(directory, "leased"), os.O_RDONLY | os.O_CREAT)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    return fd


def fifo():
    return os.open(os.path.join(directory, "fifo"), os.O_RDONLY | os.O_NONBLOCK)


def connected():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(outside)
    return sock


def encap():
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_UDP, 1, 1)  # UDP_CORK
    return sock


def relatives():
    """A grandchild that has the descriptors in common with this process, and its parent has not."""
    CLONE, UNSHARE, CLONE_FILES = 56, 272, 0x400
    reader, writer = os.pipe()
    if call(CLONE, CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        if call(CLONE, CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0) == 0:
            while True:
                signal.pause()
        call(UNSHARE, CLONE_FILES)
        os.write(writer, b"x")
        while True:
            signal.pause()
    os.read(reader, 1)
    return reader, writer


hold("neither its parent nor a sibling", relatives)
hold("io_uring", lambda: call(425, 4, ctypes.create_string_buffer(120)))
hold("fanotify", lambda: call(300, 0, 0))
hold("userfaultfd", lambda: call(323, 1))
hold("packet mode", lambda: os.pipe2(os.O_DIRECT))
hold("lease", lease)
hold("AF_PACKET", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
hold("AF_ALG", lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET))
hold("multipath", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262))
hold("netlink socket of protocol 16", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16))
hold("FIFO", fifo)
hold("unix socket", connected)
hold("UDP_CORK", encap)
hold("device /dev/kmsg", lambda: os.open("/dev/kmsg", os.O_RDONLY))
hold("namespace", lambda: os.open("/proc/self/ns/net", os.O_RDONLY))
with open(sys.argv[1], "a") as log:
    log.write(f"holds={','.join(names)}\n")
while True:
    signal.pause()
