"""Report: pages that a person reviews, made from JSON, CSV and images on disk only."""
