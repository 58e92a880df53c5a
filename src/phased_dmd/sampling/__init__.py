"""A sampler is loaded from a run or an export, makes samples, and writes them to files."""
