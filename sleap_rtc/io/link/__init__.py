"""The parts that all kinds of link share, and the interface of a link."""
