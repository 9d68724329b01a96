"""An engine without processes, for tests of scale and of faults."""

from sandkeeper.shim.engines.simulated.engine import SimulatedEngine

__all__ = ["SimulatedEngine"]
