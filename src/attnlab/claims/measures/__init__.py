"""The functions that measure claims; each takes `Cells` and settings, and returns `Measured`."""
