"""The mathematics of Phased DMD: it knows tensors, floats and callables, and imports torch alone."""
