"""Fixture that checks that every test closes its files."""

from tests.io.storage.descriptors import no_descriptor_is_left

__all__ = ["no_descriptor_is_left"]
