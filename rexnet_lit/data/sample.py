"""The sample dataset: scikit-learn's handwritten digits as a folder of class folders. Nothing is downloaded.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository
(CC BY 4.0), as shipped with scikit-learn: 1,797 images of 8 x 8 pixels, written at 32 x 32.
"""

from __future__ import annotations

import cv2
import numpy as np

from rexnet_lit.utils.files import check_new_folder, new_folder

SIZE = 32
_SPLITS = ("train", "val", "test")
_SHARES = (0.7, 0.15)  # train, val; the rest is test


def write_sample(folder: str) -> dict[str, int]:
    """Write the digits as ``folder/{train,val,test}/{0..9}/*.png``.

    Returns:
        Number of images by split.

    Raises:
        UserError: The folder exists and is not empty.
    """
    from sklearn.datasets import load_digits

    target = check_new_folder("sample", folder)
    digits = load_digits()
    counts = dict.fromkeys(_SPLITS, 0)
    with new_folder("sample", target) as root:
        for digit in range(10):
            members = np.random.default_rng(digit).permutation(np.flatnonzero(digits.target == digit))
            bounds = np.cumsum([round(share * len(members)) for share in _SHARES])
            for split, indices in zip(_SPLITS, np.split(members, bounds), strict=True):
                (root / split / str(digit)).mkdir(parents=True)
                for index in indices:
                    grey = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
                    large = cv2.resize(grey, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
                    (root / split / str(digit) / f"{index:04d}.png").write_bytes(
                        cv2.imencode(".png", large)[1].tobytes()
                    )
                counts[split] += len(indices)
    return counts
