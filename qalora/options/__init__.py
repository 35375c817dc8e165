"""What a user may choose, as records: every option once, with its help, its type, its range and its default.

The command line, recipes, their tables in the documentation and JSON are made from them. A record checks itself when it
is made. Nothing here imports torch or transformers, so that a help page is shown at once.
"""

from qalora.options.fields import Option, Options, fields_of, option, plain, split

__all__ = ["Option", "Options", "fields_of", "option", "plain", "split"]
