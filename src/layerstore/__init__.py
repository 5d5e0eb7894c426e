"""layerstore: containers start before their images have arrived."""

__version__ = "0.1.0"
