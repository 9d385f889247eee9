"""Measurements of the product, beside other ways to do the same."""
