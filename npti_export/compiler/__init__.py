"""From the rule to extra neurons: pure, without files or weights."""
