"""The runs of a study, planned to the last FLOP and written as configurations (tools/make_sweep.py)."""
