"""What is proved of a model at attach, by replaying single blocks."""
