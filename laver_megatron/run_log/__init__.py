"""What a run writes down: metrics, their records, curves, the summary."""
