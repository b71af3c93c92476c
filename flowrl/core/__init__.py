"""Pure functions of tensors: advantages, objectives, regularisers, reductions. Imports torch and flowrl.types only; no I/O, no models."""
