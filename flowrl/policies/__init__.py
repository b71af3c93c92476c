"""Policies: the only place where diffusers and transformers live."""
