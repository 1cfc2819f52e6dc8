"""Holds what a migration refuses: `refused.py LOG DIRECTORY OUTSIDE`. OUTSIDE is the name of somebody else's listening socket.

Logs `holds=NAME:DESCRIPTOR,...`: of what this kernel has. What is no descriptor has `-` for one.
"""

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import sys

directory, outside = sys.argv[2:4]
libc = ctypes.CDLL(None, use_errno=True)
SO_ATTACH_FILTER, SO_ZEROCOPY, TCP_ULP = 26, 60, 31
held = []
names = []


def call(number, *arguments):
    fd = libc.syscall(number, *arguments)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "refused by this kernel")
    return fd


def hold(name, make):
    try:
        made = make()
        held.append(made)
        # Of several, the first is the one that is meant.
        one = made[0] if isinstance(made, tuple) else made
        number = "-" if one is None else one if isinstance(one, int) else one.fileno()
        names.append(f"{name}:{number}")
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
    return None, reader, writer


def connection(prepare):
    """The end of a TCP connection that `prepare` is done to; and the other end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other = listening.accept()[0]
    prepare(one, other)
    return one, other


def urgent(one, other):
    other.send(b"!", socket.MSG_OOB)
    select.select([], [], [one], 5)


def filtered(sock, *_):
    accept_all = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFF))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxQ", 1, ctypes.addressof(accept_all)))


def listening():
    sock = socket.create_server(("127.0.0.1", 0))
    filtered(sock)
    return sock


hold("neither its parent nor a sibling", relatives)
hold("io_uring", lambda: call(425, 4, ctypes.create_string_buffer(120)))
hold("fanotify", lambda: call(300, 0, 0))
hold("userfaultfd", lambda: call(323, 1))
# Of the two, the one that is written to is in it.
hold("packet mode", lambda: os.pipe2(os.O_DIRECT)[::-1])
hold("lease", lease)
hold("AF_PACKET", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
hold("AF_ALG", lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET))
hold("multipath", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262))
hold("netlink socket of protocol 16", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16))
hold("FIFO", fifo)
hold("unix socket", connected)
hold("UDP_CORK", encap)
hold("SO_ZEROCOPY", lambda: connection(lambda one, _: one.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)))
hold("protocol in the kernel", lambda: connection(lambda one, _: one.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")))
hold("urgent data", lambda: connection(urgent))
hold("a TCP connection with a socket filter", lambda: connection(filtered))
hold("a listening socket with a filter", listening)
hold("device /dev/kmsg", lambda: os.open("/dev/kmsg", os.O_RDONLY))
hold("namespace", lambda: os.open("/proc/self/ns/net", os.O_RDONLY))
with open(sys.argv[1], "a") as log:
    log.write(f"holds={','.join(names)}\n")
while True:
    signal.pause()
