"""Attention whose heads are chosen, weighed or shared."""
