"""Artifacts: what `commvq export` writes and a CommVQCache loads."""

from __future__ import annotations

from commvq_core.artifact.reader import load_artifact
from commvq_core.artifact.schema import Artifact
from commvq_core.artifact.writer import export_run, push_to_hub

__all__ = ["Artifact", "export_run", "load_artifact", "push_to_hub"]
