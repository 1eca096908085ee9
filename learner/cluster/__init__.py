"""Ray: processes on the machines of a cluster, watched and started again. The only place that knows Ray.

    start_ray(address, token)                                  # a Ray of our own, or somebody's cluster
    ranks = plan(nodes(), tables["cluster"], "auto")           # learner.placement
    learner = LearnerHandle(tables, lambda: ranks, folders)    # the ranks of a run, as one
    while not learner.poll().done: ...                         # never blocks
    learner.stop(); stop_ray()

Ray keeps processes and moves small facts; all that a process needs after a restart it reads from its run folder.
"""

from learner.cluster.group import RankGroup
from learner.cluster.handle import FINAL, LearnerHandle, LearnerStatus
from learner.cluster.launch import alive, end, launch, place_on
from learner.cluster.placed import Placed, PlacedStatus
from learner.cluster.session import nodes, start_ray, stop_ray
from learner.restarts import RestartRule

__all__ = [
    "FINAL",
    "LearnerHandle",
    "LearnerStatus",
    "Placed",
    "PlacedStatus",
    "RankGroup",
    "RestartRule",
    "alive",
    "end",
    "launch",
    "nodes",
    "place_on",
    "start_ray",
    "stop_ray",
]
