"""A folder that a pipeline can ship: the artefacts, the proof, a model card and checksums."""

from qalora.releasing.checksums import check_sums, write_sums
from qalora.releasing.package import Release, release

__all__ = ["Release", "check_sums", "release", "write_sums"]
