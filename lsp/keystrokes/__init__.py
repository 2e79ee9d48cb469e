"""Typing that is replayed in real time, to measure ghost text: `tabwise bench keystrokes`."""
