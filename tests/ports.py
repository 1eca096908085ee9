"""A port for a process that is told its port before it opens it."""

import random
import socket

# Below the ports that the system itself gives out, to other tests that run at the same time too, and above Ray's.
FIRST, LAST = 20_000, 32_000


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    while True:
        port = random.SystemRandom().randrange(FIRST, LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
