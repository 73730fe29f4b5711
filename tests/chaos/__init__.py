"""The real mesh under load while its processes die, and an independent audit of what is left."""
