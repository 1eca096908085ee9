"""Processes to be killed, hundreds of them in seconds."""

from __future__ import annotations

import os
import signal
import traceback


class Forked:
    """A copy of this process that ``work``s and writes what it says into a pipe, until it is killed. Starts in no time."""

    def __init__(self, work):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(reading)
                work(lambda text: os.write(writing, f"{text}\n".encode()))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(3)
        os.close(writing)
        self.said = os.fdopen(reading)

    def kill(self):
        """Returns the lines that were said; half a line was not."""
        os.kill(self.pid, signal.SIGKILL)
        text = self.said.read()
        self.said.close()
        _, status = os.waitpid(self.pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it ended by itself"
        return [line.split() for line in text.split("\n")[:-1]]
