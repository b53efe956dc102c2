"""CAB: four patterns of attention, its index over their tasks, and the length from which a mechanism is worth it."""
