"""`make gpu-check`: what a card does and takes, in one table."""
