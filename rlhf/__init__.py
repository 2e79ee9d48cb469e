"""Turns what the user did into a better adapter. Knows no editor, no HTTP and no serving engine."""
