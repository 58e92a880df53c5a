"""Measures of samples: each a pure function of tensors."""
