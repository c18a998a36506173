"""Where an image came from: the manifest that a result and its files carry."""
