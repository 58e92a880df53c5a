"""Holds the networks that can be distilled, behind two protocols."""
