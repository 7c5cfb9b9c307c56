"""The version, in one place: packaging reads it without importing torch, reports and certificates quote it."""

__version__ = "0.1.0"
