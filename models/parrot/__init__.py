"""Parrot: a textless language model over two speech channels, next-token-pair prediction."""
