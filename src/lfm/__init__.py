"""Learn from models."""

__version__ = "0.1.0"
