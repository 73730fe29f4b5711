"""Images: what can be done to them, and the workers that do it."""
