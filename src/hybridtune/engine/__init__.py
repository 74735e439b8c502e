"""Makes the same training cost less time, without changing what is computed."""
