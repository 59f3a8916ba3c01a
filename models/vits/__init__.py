"""VITS on transformers: text in, speech out, sounded piece by piece."""
