"""Measures the subjects of `attn_ladder` and derives tables, verdicts and the paper from what was recorded."""
