"""Pretrained models in Flax nnx: a BERT (MiniLM) and a ViT (DINOv2), and LoRA for both."""
