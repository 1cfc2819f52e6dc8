"""A program whose load rises and falls: CPU, files that are made durable, and a conversation with itself over TCP.

usage: day.py DIRECTORY SECONDS_OF_A_DAY
"""

import math
import os
import socket
import sys
import threading
import time

directory, day_s = sys.argv[1], float(sys.argv[2])
listener = socket.create_server(("127.0.0.1", 0))


def echo():
    connection, _ = listener.accept()
    while data := connection.recv(4096):
        connection.sendall(data)


threading.Thread(target=echo, daemon=True).start()
peer = socket.create_connection(listener.getsockname())
held = bytearray(24 << 20)
file = os.open(os.path.join(directory, "day.dat"), os.O_CREAT | os.O_RDWR, 0o600)
turn = 0
while True:
    share = 0.5 - 0.5 * math.cos(2 * math.pi * time.monotonic() / day_s)
    until = time.monotonic() + 0.02 * share
    while time.monotonic() < until:
        pass
    for _ in range(1 + int(8 * share)):
        peer.sendall(b"x" * 512)
        left = 512
        while left:
            left -= len(peer.recv(left))
    os.pwrite(file, held[: 4096 << int(2 * share)], (turn % 64) * 16384)
    os.fsync(file)
    held[(turn * 4096) % len(held)] = turn % 256
    turn += 1
    time.sleep(0.02)
