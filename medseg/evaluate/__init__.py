"""Predictions against labels: figures per case, per class and in total, with intervals."""
