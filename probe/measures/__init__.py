"""What is measured of a model: one file for each measurement."""
