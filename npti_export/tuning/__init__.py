"""Search for the settings that express a pole best within a budget of damage, and ablations of them."""
