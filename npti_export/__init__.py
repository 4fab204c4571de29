"""npti-export: compile a personality into a language model file."""

__version__ = "0.1.0"
