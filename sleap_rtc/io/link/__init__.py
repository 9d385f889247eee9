"""What every kind of link is made of."""
