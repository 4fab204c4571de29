"""The PEFT tuner ``npti``: the rule around the activation module of each gated MLP."""

import peft  # noqa: F401  first, so that its import hook finds the modules below unimported
