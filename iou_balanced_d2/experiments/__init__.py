"""Experiments of many runs: what is run is written down in a protocol before the first of them."""
