"""``python -m benchmarks.models``: models of torchvision, timm, segmentation-models-pytorch and diffusers under a mask."""
