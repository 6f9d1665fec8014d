"""From runs to a scaling law and a comparison of arms (tools/fit_scaling_law.py, docs/scaling.md)."""
