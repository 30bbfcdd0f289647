"""Experiments as data: configs, presets, the paper's tables and figures, and how to run them."""
