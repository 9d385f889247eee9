"""Rooms, invites, and the sealed offers and answers of the peers in them."""
