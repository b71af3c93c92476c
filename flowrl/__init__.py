"""flowrl: reinforcement-learning fine-tuning of image generators. Importing this package imports nothing else."""

__version__ = "0.1.0"
