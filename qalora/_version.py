"""The version, in a module that imports nothing, so that setuptools and `qalora --version` read it without torch."""

__version__ = "0.2.0"
