"""The audit of a classifier of radiographs: does it read the disease, or where the image comes from?"""
