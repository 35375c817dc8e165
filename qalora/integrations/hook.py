"""Register our quantizer with transformers as soon as there is a transformers to register with.

`import qalora` must stay light, and a user may import transformers before or after it. So: where transformers' registry
(transformers.quantizers.auto) is imported already, register at once; else wait for its import, by a finder at the head
of sys.meta_path that looks at that one name, registers right after the module has run, and is gone then. The registry
imports torch by itself, so that nothing is loaded that would not have been.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install"]

REGISTRY = "transformers.quantizers.auto"
OURS = "qalora.integrations.transformers"


def install() -> None:
    """Register now, or when transformers' registry is imported; a second call changes nothing."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Import our quantizer, which registers itself. A transformers without the registry is a warning, not an error."""
    try:
        if OURS not in sys.modules:  # else it is being imported, and registers itself at its end
            importlib.import_module(OURS).register()
    except (ImportError, AttributeError) as error:
        warnings.warn(f"this transformers does not open qalora folders ({error})", RuntimeWarning, stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds the registry as it would have been found, with a loader that registers after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The registry's own spec, its loader wrapped; None for every other module."""
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The registry's own loader, and then ours."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the registry's own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, put its own loader back, register."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
