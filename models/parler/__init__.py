"""Parler-TTS on current transformers: text and a description of a voice in, speech out."""
