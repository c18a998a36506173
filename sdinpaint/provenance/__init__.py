"""The provenance of an image: the manifest that a result and its files carry."""
