#!/usr/bin/env python3
"""
An Ethernet switch whose lines take their time, for a lab whose kernel has no netem. Every port is a TAP.

    switch.py FOLDER PORT...

FOLDER/PORT holds two numbers: the milliseconds a frame takes on that port's line, either way, and the
percentage of frames that it loses. They count from the moment they are written.
"""
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


class Line:
    def __init__(self, file, name):
        self.file, self.written = file, None
        self.tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
        self.read()

    def read(self):
        written = os.stat(self.file).st_mtime_ns
        if written != self.written:
            with open(self.file) as file:
                self.delay, self.loss = (float(number) for number in file.read().split())
            self.written = written

    def loses(self):
        return random.random() * 100 < self.loss

    def frames(self):
        try:
            while True:
                yield os.read(self.tap, 65536)
        except BlockingIOError:
            pass

    def send(self, frame):
        try:
            os.write(self.tap, frame)
        except OSError:
            pass  # its host is down, or its queue is full


folder, names = sys.argv[1], sys.argv[2:]
lines = [Line(os.path.join(folder, name), name) for name in names]
of = {line.tap: line for line in lines}
poll = select.poll()
for tap in of:
    poll.register(tap, select.POLLIN)
at = {}  # the line on which a station was last heard
way = []  # frames under way, and where they go; the number keeps the order of those due at once
number = 0

while True:
    wait = max(0, (way[0][0] - time.monotonic()) * 1000) if way else 1000
    ready = poll.poll(wait)
    for line in lines:
        line.read()
    now = time.monotonic()
    for tap, _ in ready:
        source = of[tap]
        for frame in source.frames():
            at[frame[6:12]] = source
            target = at.get(frame[:6])
            for line in [target] if target else lines:
                if line is not source and not source.loses() and not line.loses():
                    number += 1
                    heapq.heappush(way, (now + (source.delay + line.delay) / 1000, number, line, frame))
    while way and way[0][0] <= time.monotonic():
        _, _, line, frame = heapq.heappop(way)
        line.send(frame)
