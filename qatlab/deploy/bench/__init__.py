"""How fast each form of a model is, timed in a process of its own beside full precision."""
