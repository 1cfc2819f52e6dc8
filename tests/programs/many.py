"""A server of many threads or processes: each serves one connection at a time, line by line, and writes to memory of its own.

usage: many.py threads|processes NUMBER PORT
"""

import os
import socket
import sys
import threading

OWN_BYTES = 256 * 1024
PAGE = 4096

kind, number, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
listener = socket.create_server(("0.0.0.0", port), backlog=number)


def serve():
    memory = bytearray(OWN_BYTES)
    while True:
        connection, _ = listener.accept()
        lines = connection.makefile("rwb")
        for count, line in enumerate(lines):
            memory[count * PAGE % OWN_BYTES] = count % 256
            lines.write(line)
            lines.flush()
        connection.close()


for _ in range(number - 1):
    if kind == "threads":
        threading.Thread(target=serve).start()
    elif os.fork() == 0:
        serve()
serve()
