"""Checks of every test of a worker."""

from tests.io.storage.descriptors import no_descriptor_is_left

__all__ = ["no_descriptor_is_left"]
