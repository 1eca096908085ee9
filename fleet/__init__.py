"""fleet-rl: what a robot author needs."""

from fleet.errors import FleetError
from fleet.robot import Feedback, Observation, Operator, Robot, Source, Takeover
from fleet.spec import Feature, RobotSpec

__version__ = "0.1.0"
__all__ = ["Feature", "Feedback", "FleetError", "Observation", "Operator", "Robot", "RobotSpec", "Source", "Takeover"]
