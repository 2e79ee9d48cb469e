"""Translates the Language Server Protocol to the agent."""
