"""The demo: a small model that retrieves from long contexts, and what it shows."""

from pathlib import Path


def model_dir() -> Path:
    """Folder of the packaged demo model (Hugging Face format)."""
    return Path(__file__).parent / "model"
