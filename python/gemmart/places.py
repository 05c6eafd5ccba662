"""Where the configuration files are, and the GPU modules."""

from __future__ import annotations

from pathlib import Path

from platformdirs import site_config_path, user_cache_path, user_config_path


def config_files() -> list[Path]:
    """The configuration files, the weaker first; they need not exist."""
    return [folder("gemmart") / "config.toml" for folder in (site_config_path, user_config_path)]


def modules_folder() -> Path:
    """Where GPU modules that were built here are kept; it need not exist."""
    return user_cache_path("gemmart") / "modules"
