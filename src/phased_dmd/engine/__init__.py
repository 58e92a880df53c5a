"""Knows the device and the processes, shards networks over them, and draws random numbers."""
