"""Pure protocol core: values and state machines, without any input or output."""
