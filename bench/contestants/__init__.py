"""The ways that are compared; each module makes some of them."""
