"""What a run is made on: the device, the processes, how networks are spread over them, and random numbers."""
