"""Images: pulled by reference or taken from a local layout, unpacked once, shared by digest."""

from sandkeeper.shim.engines.oci.images.store import ImageStore
from sandkeeper.shim.engines.oci.images.types import (
    Image,
    ImageConfig,
    ImageSettings,
    Progress,
    StoreSettings,
)

__all__ = ["Image", "ImageConfig", "ImageSettings", "ImageStore", "Progress", "StoreSettings"]
