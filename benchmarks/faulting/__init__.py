"""What ``benchmarks/faults.py`` breaks: commands, ways to stop them, disks that fail, damaged inputs and kept files."""
