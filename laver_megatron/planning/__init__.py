"""Before a run: layouts, memory and time reckoned (`planner`), and every rank built without memory (`dry_run`)."""
