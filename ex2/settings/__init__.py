"""What a run is: flags, presets, and what is built from them."""
