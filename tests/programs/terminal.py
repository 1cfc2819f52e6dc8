"""Sits at a pseudo-terminal in which a shell runs: `terminal.py LOG COMMAND...`.

What the shell prints goes to LOG. What is in LOG.type is typed when it is there, and the file is removed.
"""

import os
import pty
import select
import sys

log = open(sys.argv[1], "ab", buffering=0)
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(sys.argv[2], sys.argv[2:])
while True:
    if terminal in select.select([terminal], [], [], 0.02)[0]:
        log.write(os.read(terminal, 4096))
    try:
        with open(sys.argv[1] + ".type", "rb") as keys:
            text = keys.read()
    except FileNotFoundError:
        continue
    os.remove(sys.argv[1] + ".type")
    os.write(terminal, text)
