"""Sampling: the sampler itself, how it is loaded from a run or an export, and what it writes."""
