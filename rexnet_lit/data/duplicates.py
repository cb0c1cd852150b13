"""Duplicate images: files with the same bytes, and the same image saved again.

Near-duplicates are found in two steps. A perceptual hash (63 signs of low DCT frequencies, after Zauner,
"Implementation and benchmarking of perceptual image hash functions", 2010) proposes pairs, and small colour
thumbnails confirm them. Without the second step all white pages with a line on them would be duplicates.

Comparing all pairs is quadratic, so only hashes that agree in one of four 16-bit bands are compared. This finds
every pair that differs in at most 3 bits, and most pairs that differ in up to `MAX_DISTANCE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

MAX_DISTANCE = 6
"""Bits in which the hashes of one image may differ: 96 % of clip art saved at half its size are within this."""

_MAX_DIFFERENCE = 4.0  # mean difference of thumbnails, of 255 levels; 90 % of JPEG copies of quality 50 are below 2.5
_MAX_SHARE = 0.1  # of the contrast: compares the lines of two pages with a line each
_MIN_CONTRAST = 8.0  # standard deviation of a thumbnail below which an image is taken as blank
_WINDOW = 64  # neighbours with the same band that are compared, where thousands look alike


def perceptual_hash(pixels: NDArray[np.uint8]) -> int:
    """Return the 63-bit hash of an image ``(H, W, 3)``."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()[1:]  # the first is the mean brightness
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image ``(H, W, 3)`` as ``(16, 16, 3)``."""
    return np.asarray(cv2.resize(pixels, (16, 16), interpolation=cv2.INTER_AREA), np.uint8)


def equal_groups(contents: NDArray[np.uint8]) -> list[list[int]]:
    """Return groups of positions of files with the same content, in the order of their first file.

    Args:
        contents: ``(N, 16)`` digests; those of zeros (unreadable files) match nothing.
    """
    _, keys, counts = np.unique(contents.view("V16").ravel(), return_inverse=True, return_counts=True)
    groups: dict[int, list[int]] = {}
    for position in np.flatnonzero((counts[keys] > 1) & contents.any(axis=1)).tolist():
        groups.setdefault(int(keys[position]), []).append(position)
    return list(groups.values())


def groups_across(groups: Iterable[list[int]], labels: Sequence[object] | NDArray[Any]) -> list[list[int]]:
    """Return the groups whose members have more than one label, such as a split or a class."""
    return [group for group in groups if len({labels[position] for position in group}) > 1]


def near_groups(hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8]) -> list[list[int]]:
    """Return groups of images that look the same.

    Args:
        hashes: ``(N,)`` from `perceptual_hash`.
        thumbnails: ``(N, 16, 16, 3)`` from `thumbnail`. Nearly blank ones match nothing.
    """
    contrast = thumbnails.reshape(len(thumbnails), -1).std(axis=1) if len(thumbnails) else np.zeros(0)
    busy = np.flatnonzero(contrast >= _MIN_CONTRAST)
    allowed = np.minimum(_MAX_DIFFERENCE, _MAX_SHARE * contrast)
    heads = np.arange(len(hashes))  # the first member of each image's group
    for first, second in _candidates(hashes[busy]):
        a, b = busy[first], busy[second]
        a, b = a[heads[a] != heads[b]], b[heads[a] != heads[b]]
        difference = np.abs(thumbnails[a].astype(np.int16) - thumbnails[b]).mean(axis=(1, 2, 3))
        same = difference <= np.minimum(allowed[a], allowed[b])
        heads = _joined(heads, a[same], b[same])
    groups: dict[int, list[int]] = {}
    for position, head in enumerate(heads.tolist()):
        groups.setdefault(head, []).append(position)
    return [positions for positions in groups.values() if len(positions) > 1]


def _joined(heads: NDArray[np.intp], a: NDArray[np.intp], b: NDArray[np.intp]) -> NDArray[np.intp]:
    """Join the groups of these pairs and return the head of every image's group."""
    if not len(a):
        return heads
    for i, j in zip(heads[a].tolist(), heads[b].tolist(), strict=True):
        while heads[i] != i:
            i = int(heads[i])
        while heads[j] != j:
            j = int(heads[j])
        heads[max(i, j)] = min(i, j)
    while (heads[heads] != heads).any():
        heads = heads[heads]
    return heads


def _candidates(hashes: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yield arrays of pairs that share a band and differ in few bits."""
    for band in range(4):
        part = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.lexsort((hashes, part))  # equal hashes are neighbours
        part, sorted_hashes = part[order], hashes[order]
        for step in range(1, min(_WINDOW, len(hashes) - 1) + 1):
            same = np.flatnonzero(part[:-step] == part[step:])
            if not len(same):
                break
            near = same[_distance(sorted_hashes[same], sorted_hashes[same + step]) <= MAX_DISTANCE]
            yield order[near], order[near + step]


def _distance(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Count the bits that differ."""
    bits = np.unpackbits(np.ascontiguousarray(a ^ b).view(np.uint8).reshape(-1, 8), axis=1)
    return np.asarray(bits.sum(axis=1), np.int64)
