"""Moving images between registries, storages and files, and changing them on the way."""

from layerstore.copy.context import CopyContext
from layerstore.copy.convert import ConvertedImage, ConvertOptions, ConvertResult, convert
from layerstore.copy.convertlayer import ConvertedLayer, LayerProgress
from layerstore.copy.copyimage import CopyOptions, CopyResult, Platforms, copy_image
from layerstore.copy.manifestedit import Family
from layerstore.copy.recompress import Form
from layerstore.copy.saveload import LoadedImage, SaveFormat, load, save

__all__ = [
    "ConvertOptions",
    "ConvertResult",
    "ConvertedImage",
    "ConvertedLayer",
    "CopyContext",
    "CopyOptions",
    "CopyResult",
    "Family",
    "Form",
    "LayerProgress",
    "LoadedImage",
    "Platforms",
    "SaveFormat",
    "convert",
    "copy_image",
    "load",
    "save",
]
