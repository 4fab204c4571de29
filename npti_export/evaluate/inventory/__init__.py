"""Self-report items, answered by the probabilities of their options."""
