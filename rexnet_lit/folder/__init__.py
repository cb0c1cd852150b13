"""A dataset's folder: its classes, splits and images, by name alone. No torch, and no image is opened."""

from rexnet_lit.folder.scanner import (
    ImageFolder,
    Samples,
    fingerprint,
    list_images,
    scan,
    survey,
    write_split,
)
from rexnet_lit.folder.splits import Split, lists_images_of, some
from rexnet_lit.folder.walk import PathList

__all__ = [
    "ImageFolder",
    "PathList",
    "Samples",
    "Split",
    "fingerprint",
    "list_images",
    "lists_images_of",
    "scan",
    "some",
    "survey",
    "write_split",
]
