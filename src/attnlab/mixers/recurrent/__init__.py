"""Recurrent state-space mixers."""
