"""Drivers of the chunked transfer: links on one side, files on the other."""
