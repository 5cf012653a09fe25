"""Continued pretraining and fine-tuning: packed sequences and a model folder in, a trained model folder out."""
