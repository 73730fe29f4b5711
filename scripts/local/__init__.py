"""Runs the mesh on one machine: installs what is missing, starts, stops and shows it."""
