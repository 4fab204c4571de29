"""The report that people look at: figures, and one self-contained HTML page, of an evaluation."""
