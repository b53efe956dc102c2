"""gCOG: questions about a grid of objects, joined by if, then and else."""
