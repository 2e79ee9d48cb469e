"""One file for each method of the Language Server Protocol that Tabwise answers."""
