"""Which layout a run is to have, and what it costs: memory, communication, time (tools/plan.py, docs/planning.md)."""
