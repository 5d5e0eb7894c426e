"""Moving images between registries and layouts, and changing them on the way."""

from layerstore.copy.convert import ConvertedImage, ConvertOptions, ConvertResult, convert
from layerstore.copy.convertlayer import ConvertedLayer, LayerProgress

__all__ = [
    "ConvertOptions",
    "ConvertResult",
    "ConvertedImage",
    "ConvertedLayer",
    "LayerProgress",
    "convert",
]
