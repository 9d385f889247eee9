"""Every test here closes what was opened."""

from tests.io.storage.descriptors import no_descriptor_is_left

__all__ = ["no_descriptor_is_left"]
