"""How peers meet: rooms, invites, sealed offers and answers."""
