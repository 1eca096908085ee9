"""The supervisor of a node other than the first: ``python -m infra.node --shared DIR --folder DIR --name NAME``.

The driver starts it through Ray as a process that outlives Ray and the driver. It makes the node's own run folder, serves
a gateway with a shard of the buffer, and ends on SIGTERM or the run's stop file. A second one on a folder ends at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
from pathlib import Path

from fleet.errors import FleetError, RunFolderError
from fleet.journal import Journal
from fleet.runfolder import RunFolder
from infra.nodes import Presence, check_name
from infra.supervisor import Supervisor
from infra.up import lock_run, start_gateway

log = logging.getLogger("fleet.node")
POLL_S = 0.2


def serve_node(shared: Path, folder: Path, name: str, stop: threading.Event) -> None:
    """Serves until ``stop`` or the stop file.

    Args:
        shared: The run's part that all nodes share.
        folder: The run folder of this node; made if it is missing.

    Raises:
        RunFolderError: ``folder`` belongs to another run, or another process serves it.
        FleetError: The gateway does not start, or cannot be kept running.
    """
    check_name(name)
    run = RunFolder.attach(folder, shared)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(lock_run(run, "fleet node")))
        presence = Presence(run, name)
        journal = stack.enter_context(contextlib.closing(Journal(run.logs / "supervisor.jsonl")))
        if not (run.registry / "socket").exists():  # nobody listens there: without registry.url the view is on the first node
            (run.registry / "socket").write_text(str(run.registry / "none"))
        supervisor = Supervisor(journal)
        stack.callback(presence.leave)
        stack.callback(supervisor.stop)
        start_gateway(run, supervisor)
        presence.start()
        log.info("node %s serves run %s in %s", name, run.run_id, run.path)
        while not stop.wait(POLL_S) and not presence.stop_asked.is_set():
            supervisor.poll()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a shard of a run on this node.")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, frame: stop.set())
    try:
        serve_node(args.shared, args.folder.expanduser(), args.name, stop)
    except RunFolderError as error:
        log.error("%s", error)
        sys.exit(2)
    except FleetError as error:
        log.error("the node cannot serve: %s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
