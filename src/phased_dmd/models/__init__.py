"""The networks that can be distilled, behind two protocols."""
