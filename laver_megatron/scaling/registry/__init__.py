"""What runs leave, run_summary.json, and all of them as a table."""
