"""Silhouettes in: walkers, foreign layouts, the packed dataset, sampling, augmentation and the DALI pipeline."""
