"""The stages of a run, each in a file of its own, and what opens and closes a run around them."""
