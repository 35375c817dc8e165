"""Packages of Node: those that NODE_PATH has, and no others."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["installing", "package_folder"]


def package_folder(name: str) -> Path | None:
    """The folder of a package; None where it is not installed. A name with slashes may be of one within another."""
    places = [Path(place) for place in os.environ.get("NODE_PATH", "").split(os.pathsep) if place]
    return next((place / name for place in places if (place / name / "package.json").is_file()), None)


def installing(name: str) -> str:
    """What a user does to install one."""
    return f"npm install {name}, and let NODE_PATH name the node_modules folder that this makes"
