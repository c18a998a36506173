"""The version of sdinpaint, which manifests and benchmark rows name."""

__version__ = "0.1.0"
