"""Measures the subjects of `attn_ladder`, and derives what the paper says of them."""
