"""Attention among spikes: binary maps over time steps, products without a softmax."""
