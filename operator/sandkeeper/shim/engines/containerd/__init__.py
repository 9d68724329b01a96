"""The containerd engine: containers as tasks of a containerd, around the oci engine's sandbox process."""

from sandkeeper.shim.engines.containerd.engine import ContainerdEngine

__all__ = ["ContainerdEngine"]
