"""Scaling studies: sweeps of runs, the registry of what they leave, and the laws fitted to it."""
