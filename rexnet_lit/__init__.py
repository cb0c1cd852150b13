"""Fine-tune ReXNet image classifiers on your own folder of images."""
