"""What a result says: its files, curves, verdict and checks. No torch here."""
