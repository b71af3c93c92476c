"""Likelihoods: (policy, decisions) -> log-probabilities. One signature, whatever a decision is."""
