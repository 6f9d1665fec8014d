"""How a run survives faults: it stops in order, is watched, says what it does, and is started again."""
