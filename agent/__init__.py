"""Answers completion and explanation requests: the model side of Tabwise, its daemon and its command line."""
