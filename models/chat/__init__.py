"""Text chat with any causal LM of Transformers: one batch for all conversations."""
