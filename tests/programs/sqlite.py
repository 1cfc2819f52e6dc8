"""Moves money between accounts in an SQLite database in WAL mode, and verifies the sum.

usage: sqlite.py LOG DATABASE
"""

import sqlite3
import sys
import time

log = open(sys.argv[1], "a", buffering=1)
database = sqlite3.connect(sys.argv[2], isolation_level=None)
mode = database.execute("PRAGMA journal_mode=WAL").fetchone()[0]
database.execute("PRAGMA wal_autocheckpoint=50")
database.execute("CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER)")
database.execute("CREATE TABLE done (number INTEGER PRIMARY KEY)")
database.executemany("INSERT INTO accounts VALUES (?, 1000)", [(n,) for n in range(100)])
reader = sqlite3.connect(sys.argv[2], isolation_level=None)
number = 0
while True:
    number += 1
    database.execute("BEGIN IMMEDIATE")
    database.execute("UPDATE accounts SET balance = balance - 5 WHERE id = ?", (number % 100,))
    database.execute("UPDATE accounts SET balance = balance + 5 WHERE id = ?", (number * 7 % 100,))
    database.execute("INSERT INTO done VALUES (?)", (number,))
    database.execute("COMMIT")
    found = reader.execute("SELECT (SELECT sum(balance) FROM accounts), (SELECT max(number) FROM done)").fetchone()
    if found != (100_000, number) or mode != "wal":
        log.write(f"WRONG: {found} {mode}\n")
        sys.exit(1)
    if number % 200 == 0 and reader.execute("PRAGMA integrity_check").fetchone() != ("ok",):
        log.write("WRONG: damaged\n")
        sys.exit(1)
    log.write(f"round={number}\n")
    time.sleep(0.005)
