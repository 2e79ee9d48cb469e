"""The version of Tabwise, in one place: the build, the daemon and the language server all read it here."""

__version__ = "0.1.0"
