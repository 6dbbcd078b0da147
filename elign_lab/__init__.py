"""Align molecular diffusion models to physics."""
