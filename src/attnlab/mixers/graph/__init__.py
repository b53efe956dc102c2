"""Attention whose map is read as a graph, and its tokens as nodes."""
