"""How a run survives faults: stopping in order, one run for each directory, starting again."""
