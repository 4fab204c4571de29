"""Judge models rate answers by the paper's protocol: strength of the trait, and fluency, 1 to 5 each."""
