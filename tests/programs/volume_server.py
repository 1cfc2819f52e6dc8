"""A server of one file: each line that comes is a write to a page of it at random, and comes back. `check` has all pages read back.

usage: volume_server.py DIRECTORY BYTES PORT
"""

import os
import random
import socket
import sys

PAGE = 4096
CHUNK = 1 << 20

directory, length, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
file = os.open(os.path.join(directory, "file"), os.O_CREAT | os.O_RDWR)
for at in range(0, length, CHUNK):
    os.pwrite(file, os.urandom(min(CHUNK, length - at)), at)
os.fsync(file)
written = {}
chance = random.Random(1)
listener = socket.create_server(("0.0.0.0", port))


def page_of(line):
    return line * (PAGE // len(line)) + line[: PAGE % len(line)]


def check():
    for page, line in written.items():
        if os.pread(file, PAGE, page * PAGE) != page_of(line):
            return b"WRONG: page %d is not as it was written\n" % page
    return b"check\n"


while True:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines = connection.makefile("rwb")
    for line in lines:
        if line == b"check\n":
            lines.write(check())
        else:
            page = chance.randrange(length // PAGE)
            os.pwrite(file, page_of(line), page * PAGE)
            written[page] = line
            lines.write(line)
        lines.flush()
    connection.close()
