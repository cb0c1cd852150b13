"""From a folder of images to batches: scanning, splits, decoding, transforms, samplers, loaders, the data module.

May import `utils`. Only the data module uses Lightning.
"""
