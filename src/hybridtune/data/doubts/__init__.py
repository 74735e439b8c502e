"""What no rule can decide about rows, and a person should look at: each a function of texts or arrays."""
