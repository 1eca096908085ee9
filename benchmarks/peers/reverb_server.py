"""A Reverb server with one table: ``python reverb_server.py MAX_ITEMS``. Says ``port N``, ends with its input.

The table never holds inserts back (MinSize(1)) and drops the oldest item; nothing is checkpointed.
"""

import sys

import reverb

if __name__ == "__main__":
    table = reverb.Table(
        "steps",
        sampler=reverb.selectors.Uniform(),
        remover=reverb.selectors.Fifo(),
        max_size=int(sys.argv[1]),
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
    server = reverb.Server([table], port=None)
    sys.stdout.write(f"port {server.port}\n")
    sys.stdout.flush()
    sys.stdin.readline()
    server.stop()
