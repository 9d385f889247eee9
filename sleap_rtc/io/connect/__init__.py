"""Dial a peer, and listen for peers, over all kinds of link at once."""
