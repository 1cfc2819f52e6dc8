"""Known amounts per second: reads blocks of FILE from the disk, past the page cache, and talks over TCP.

    steady.py serve PORT            answers each request of 100 bytes with 400
    steady.py work PORT FILE        50 times a second: 16 blocks of 4 KiB read, 10 requests

When it is late it makes up for it, so that the rates hold over any longer time.
"""

import mmap, os, random, socket, sys, time

REQUEST, ANSWER, REQUESTS, BLOCKS, BLOCK, PER_S = 100, 400, 10, 16, 4096, 50


def whole(connection, length):
    got = b""
    while len(got) < length:
        part = connection.recv(length - len(got))
        if not part:
            sys.exit("the connection ended")
        got += part
    return got


def serve(port):
    listener = socket.create_server(("127.0.0.1", port))
    connection, _ = listener.accept()
    while True:
        whole(connection, REQUEST)
        connection.sendall(b"a" * ANSWER)


def connect(port):
    for _ in range(200):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.05)
    sys.exit("nobody serves")


def work(port, path):
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    blocks = os.fstat(file).st_size // BLOCK
    buffer = mmap.mmap(-1, BLOCK)
    connection = connect(port)
    began, ticks = time.monotonic(), 0
    while True:
        for _ in range(BLOCKS):
            os.preadv(file, [buffer], random.randrange(blocks) * BLOCK)
        for _ in range(REQUESTS):
            connection.sendall(b"r" * REQUEST)
            whole(connection, ANSWER)
        ticks += 1
        time.sleep(max(0.0, began + ticks / PER_S - time.monotonic()))


if sys.argv[1] == "serve":
    serve(int(sys.argv[2]))
else:
    work(int(sys.argv[2]), sys.argv[3])
