"""The device, the processes and what they do together, how networks are sharded over them, and random numbers."""
