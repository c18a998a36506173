"""Checkpoint files: found, understood, inspected, converted and merged; tensors are read once all is known to fit."""
