"""The pure core of the protocol: values and state machines, without input or output."""
