"""The formats that a rule can be written in: one file each, behind one small interface."""
