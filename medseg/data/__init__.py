"""From a cohort to batches: transforms, caching, loaders; and the simulated subjects of the embedded demo."""
