"""paced.py CPU_MS PERIOD_MS: computes for CPU_MS of its own CPU time in every PERIOD_MS. When it is late it makes up for it, but for no more
than ten periods."""

import sys, time

cpu_s, period_s = (float(word) / 1e3 for word in sys.argv[1:3])
due = time.monotonic()
while True:
    until = time.process_time() + cpu_s
    while time.process_time() < until:
        pass
    due = max(due + period_s, time.monotonic() - 10 * period_s)
    time.sleep(max(0.0, due - time.monotonic()))
