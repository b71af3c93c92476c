"""Samplers for flow-matching models: sigma grids, transition kernels, rollout plans and their executor. Imports torch and flowrl.types only."""
