"""The OCI engine: containers made by crun, runc or runsc, watched by conmon, joined to a catatonit sandbox process."""

from sandkeeper.shim.engines.oci.engine import OCIEngine
from sandkeeper.shim.engines.oci.options import Options

__all__ = ["OCIEngine", "Options"]
