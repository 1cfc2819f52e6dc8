"""Writes to an SQLite database in WAL mode, and verifies that all it has committed is there, and nothing else.

usage: sqlite_wal.py LOG DIRECTORY PAUSE_S
"""

import os
import sqlite3
import sys
import time

log_path, directory, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
log = open(log_path, "a", buffering=1)
path = os.path.join(directory, "database")


def connect():
    connection = sqlite3.connect(path, isolation_level=None, timeout=20)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA mmap_size=67108864")
    return connection


writer = connect()
writer.execute("CREATE TABLE entries (number INTEGER PRIMARY KEY, contents BLOB)")
child = os.fork()
# A connection is no other process's.
if child == 0:
    reader = connect()
    seen = 0
    while True:
        count, last = reader.execute("SELECT count(*), coalesce(max(number), 0) FROM entries").fetchone()
        if count != last or last < seen:
            log.write(f"WRONG: {count} entries, the last is {last}, and {seen} was seen\n")
            os._exit(1)
        seen = last
        time.sleep(pause)
number = 0
while True:
    number += 1
    writer.execute("INSERT INTO entries VALUES (?, ?)", (number, os.urandom(2000)))
    count = writer.execute("SELECT count(*) FROM entries").fetchone()[0]
    if count != number:
        log.write(f"WRONG: {count} entries instead of {number}\n")
        sys.exit(1)
    if number % 200 == 0:
        answer = writer.execute("PRAGMA integrity_check").fetchone()[0]
        if answer != "ok":
            log.write(f"WRONG: {answer}\n")
            sys.exit(1)
    if number % 317 == 0:
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    log.write(f"round={number}\n")
    time.sleep(pause)
