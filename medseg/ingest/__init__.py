"""From what hospitals and publishers hand over to a cohort: readers, checks, public data sets."""
