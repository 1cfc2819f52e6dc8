"""Computes, sleeps and waits in several threads, and finds out if any of it goes wrong: verify.py LOG."""
import hashlib
import queue
import sys
import threading
import time

log = open(sys.argv[1], "a", buffering=1)
numbers = queue.Queue(maxsize=8)
answers = queue.Queue(maxsize=8)


def answer():
    while True:
        number = numbers.get(timeout=60)
        answers.put((number, hashlib.sha256(b"%d" % number * 2000).hexdigest()))


for _ in range(3):
    threading.Thread(target=answer, daemon=True).start()

number = 0
while True:
    expected = {}
    for _ in range(4):
        number += 1
        expected[number] = hashlib.sha256(b"%d" % number * 2000).hexdigest()
        numbers.put(number)
    began = time.monotonic()
    time.sleep(0.01)
    if time.monotonic() - began < 0.01:
        print("MISMATCH a sleep was too short", file=log)
        sys.exit(1)
    got = dict(answers.get(timeout=60) for _ in range(4))
    if got != expected:
        print("MISMATCH", got, expected, file=log)
        sys.exit(1)
    print(f"line={number}", file=log)
