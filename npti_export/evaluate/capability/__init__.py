"""What steering does to what a model knows and can: small test sets of our own, and KL to the base on neutral text."""
