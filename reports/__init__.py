"""What is shown: verdict, figures, the one-file HTML page. Reads a saved result, imports no torch."""
