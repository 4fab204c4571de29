"""Identification by several workers: questions sharded over Ray actors, their statistics merged in a fixed order."""
