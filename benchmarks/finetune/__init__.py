"""Pretrained models: their upper layers, LoRA, and whole."""
