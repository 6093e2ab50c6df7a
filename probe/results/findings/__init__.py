"""What tables say, in sentences: one file for each measurement that has something to say."""
