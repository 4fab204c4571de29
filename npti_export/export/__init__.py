"""From a compiled program to a file."""
