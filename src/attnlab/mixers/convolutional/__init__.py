"""Convolutions and gates in place of attention."""
