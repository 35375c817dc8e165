"""What commands say on stderr, without what `train` says of its data at the start."""

import re
from collections.abc import Iterable

DATA = re.compile(r"^note: (.*: plain text$|learned: |the first piece that is learned: )")


def besides_data(lines: Iterable[str]) -> list[str]:
    """The lines that are not about a text file that is learned whole."""
    return [line for line in lines if not DATA.match(line)]
