"""Frozen CLIP models through open_clip, and prompts for them. Importing this package does not import torch."""
