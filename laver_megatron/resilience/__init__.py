"""How a run notices faults, says what they are, and ends: phases, heartbeats, watchdog, status, goodput."""
